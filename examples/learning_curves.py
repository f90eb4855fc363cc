"""Learning curves of DIPO beside SAC, TD3 and PPO (Figure 6), each trained by the RL Zoo; from a laptop to a cluster.

    python examples/learning_curves.py --envs HalfCheetah-v5 Hopper-v5 --algorithms dipo sac td3
    python examples/learning_curves.py --algorithms dipo sac --jobs 8 --device cuda --gpus-per-run 0.125
    python examples/learning_curves.py --algorithms dipo sac --address auto --out /shared/curves

What is cut off goes on with the same command, what has finished is not trained again. `--jobs` above 1 and `--address` need
Ray (the extra `cluster`); on a cluster, `--out` and this folder lie where all machines see them. DIPO has the settings of
this project's YAML, the others the paper's or the zoo's (`--baselines`). `--variants` adds DIPOs, or others, of your own,
from a YAML file: `mine: {algo: dipo, action_lr: 0.1, policy_kwargs: {num_train_timesteps: 50}}`.

To tune on many machines start on each, with a storage that all reach,
    python -m rl_zoo3.train --algo dipo --env Hopper-v5 -optimize --storage postgresql://... --study-name hopper
"""

from pathlib import Path

from experiments import NAMES
from grid import VARIANTS, arguments, read_variants, run_and_report


def main() -> None:
    quick = "DIPO and SAC with tiny networks, 300 steps of one task, two seeds: half a minute"
    parser = arguments(__doc__ or "", "runs/learning_curves", quick)
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", help=f"of {', '.join(VARIANTS)} (dipo sac td3 ppo)")
    parser.add_argument("--variants", type=Path, help="YAML file of more of them")
    parser.add_argument("--baselines", choices=("paper", "zoo"), default="paper", help="settings of the others (%(default)s)")
    args = parser.parse_args()
    known = VARIANTS | (read_variants(args.variants) if args.variants else {})
    names = args.algorithms or (["dipo", "sac"] if args.quick else list(NAMES))
    for name in names:
        if name not in known:
            parser.error(f"--algorithms: {name} must be of {', '.join(known)}")
    run_and_report(parser, args, {name: known[name] for name in names}, "Learning curves", args.out)


if __name__ == "__main__":
    main()
