"""Learning curves of DIPO beside SAC, TD3 and PPO (Figure 6), each trained by the RL Zoo, from a laptop to a cluster.

    python examples/paper/learning_curves.py --envs HalfCheetah-v5 Hopper-v5 --algorithms dipo sac td3
    python examples/paper/learning_curves.py --algorithms dipo sac tqc crossq --baselines zoo --results examples/results/zoo
    python examples/paper/learning_curves.py --algorithms dipo sac --jobs 8 --device cuda --gpus-per-run 1
    python examples/paper/learning_curves.py --algorithms dipo sac --address auto --out /shared/curves

A training that was cut off goes on with the same command, and one that has finished is not started again. `--jobs` above 1
and `--address` need Ray (the extra `cluster`); on a cluster, `--out` and this folder must lie where all machines see them.

`dipo` has the recommended setting (hyperparams/dipo.yml), `dipo_paper` the paper's (dipo_paper.yml), `dipo_k20` the paper's
with K = 20, `dipo_long` that with few, long ascent steps, and `dipo_few` few denoising steps besides. The others have the
settings of the paper's Table 2, or with `--baselines zoo` those of the RL Zoo; TQC and CrossQ, which the paper has not, need
the zoo's. `--variants` adds algorithms of your own from a YAML file:
`mine: {algo: dipo, action_lr: 0.1, policy_kwargs: {num_train_timesteps: 50}}`.

The report is written to --results, with the raw evaluations of each training in evaluations/. Where these are, `--report`
makes the same report again, without the trainings.

To tune on many machines, start this on each, with a storage that all of them reach:
    python -m rl_zoo3.train --algo dipo --env Hopper-v5 -optimize --storage postgresql://... --study-name hopper
"""

from grid import VARIANTS, choose, parse
from grid_report import QUICK, compare, comparison_arguments


def main() -> None:
    quick = "DIPO and SAC with tiny networks, 300 steps of one task, two seeds: half a minute"
    parser = comparison_arguments(__doc__ or "", "runs/learning_curves", quick)
    names = f"of {', '.join(VARIANTS)} (%(default)s)"
    parser.add_argument("--algorithms", nargs="+", metavar="NAME", default=["dipo", "sac", "td3", "ppo"], help=names)
    parser.add_argument("--baselines", choices=("paper", "zoo"), default="paper", help="settings of the others (%(default)s)")
    args = parse(parser, dict(QUICK, algorithms=["dipo", "sac"]))
    compare(parser, args, choose(parser, args, args.algorithms), "Learning curves", args.baselines, args.out)


if __name__ == "__main__":
    main()
