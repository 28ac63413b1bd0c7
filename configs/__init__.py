"""YAML fragments that recipes extend."""

if __name__ != "dlm_lightning.configs":
    raise ImportError("import dlm_lightning.configs; a bare `configs` would be a second copy")
