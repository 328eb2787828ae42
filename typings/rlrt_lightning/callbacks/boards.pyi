from callbacks.boards import *  # noqa: F403
