"""The paper's instruments (arXiv:2605.10781, Figs. 5 to 9 and 11): each writes its data and a plot.

`curves` and `pass_at_k` read the output of runs and evaluations. `reflection` and `shift` generate rollouts from a
trained policy, and take the same configs as training.
"""
