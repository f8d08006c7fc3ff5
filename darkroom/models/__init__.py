"""The torch side: which pipelines there are, how a stage loads its part of one, and how their forwards are batched."""

import diffusers
import transformers

# Before anything of theirs is imported: a warning in plain text or a progress bar is no log line.
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
