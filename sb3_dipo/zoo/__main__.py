"""
The scripts of rl_zoo3 with DIPO among the algorithms, without the start-up file: ``python -m sb3_dipo.zoo train --algo dipo``.

Needed only where that file is switched off (``SB3_DIPO_ZOO=0``) or not seen (``python -S``); it changes nothing otherwise.
"""

import importlib
import os
import runpy
import sys

from sb3_dipo.zoo import MODULES, register

SCRIPTS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record_video": "rl_zoo3.record_video",
    "record_training": "rl_zoo3.record_training",
    "benchmark": "rl_zoo3.benchmark",
    "load_from_hub": "rl_zoo3.load_from_hub",
    "push_to_hub": "rl_zoo3.push_to_hub",
    "all_plots": "rl_zoo3.plots.all_plots",
    "plot_train": "rl_zoo3.plots.plot_train",
    "plot_from_file": "rl_zoo3.plots.plot_from_file",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        sys.exit(f"usage: python -m sb3_dipo.zoo {{{','.join(SCRIPTS)}}} [options of the script]")
    script = sys.argv.pop(1)
    # for the scripts that start others
    os.environ["SB3_DIPO_ZOO"] = "1"
    for name in MODULES:
        register(importlib.import_module(name))
    runpy.run_module(SCRIPTS[script], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
