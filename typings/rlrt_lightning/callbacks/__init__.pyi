# For type checkers: rlrt_lightning.callbacks is what stands in callbacks/ at the top of the repository.
from callbacks import *  # noqa: F403
