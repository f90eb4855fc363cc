"""Hyper-parameters for the RL Zoo, installed as ``sb3_dipo.hyperparams``: find the files with ``importlib.resources``."""
