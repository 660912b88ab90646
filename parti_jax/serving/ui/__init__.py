"""The page of `parti-jax ui`, made with Gradio, which must neither look for updates nor send statistics."""

import os

# Read when Gradio is imported, which every module of this package does after this.
os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
