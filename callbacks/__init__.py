"""Callbacks, one a file."""

if __name__ != "dlm_lightning.callbacks":
    raise ImportError("import dlm_lightning.callbacks; a bare `callbacks` would be a second copy of every class")
