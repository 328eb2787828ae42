"""The paper's instruments (arXiv:2605.10781, Figs. 5 to 9 and 11): each writes its data and a finished figure.

`curves` and `passk` read what runs and evaluations have written; `reflection` and `shift` draw rollouts from a trained
policy, and are commands of the same command line with the same configs as training.
"""
