"""Recipes: one YAML that runs, and at most one Python file with its LightningModule, by the same stem."""

if __name__ != "dlm_lightning.recipes":
    raise ImportError("import dlm_lightning.recipes; a bare `recipes` would be a second copy of every class")
