"""dlm_lightning turns pretrained autoregressive language models into diffusion language models.

Importing the package imports nothing else; `dlm_lightning.module.Recipe` is where a plug-in starts.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dlm_lightning")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
