"""Time one update and one action of DIPO and of SB3's SAC, in turn in one run.

    python examples/speed.py --threads 1

Prints medians in milliseconds, the median of the ratios taken pair by pair, and the device.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_dipo import DIPO


def milliseconds(function: Callable[[], object], device: th.device) -> float:
    """How long a call takes, all work on the device included."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        th.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--env", default="Hopper-v5", help="(%(default)s)")
    parser.add_argument("--denoising-steps", type=int, default=100, help="K (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs, after one that is not counted (%(default)s)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (its default)")
    args = parser.parse_args()
    if args.threads:
        th.set_num_threads(args.threads)

    policy_kwargs = {"num_train_timesteps": args.denoising_steps}
    dipo = DIPO("MlpPolicy", args.env, learning_starts=500, buffer_size=1_000, policy_kwargs=policy_kwargs)
    sac = SAC("MlpPolicy", args.env, learning_starts=500, buffer_size=1_000)
    models: list[OffPolicyAlgorithm] = [dipo, sac]
    for model in models:
        model.learn(501)
    device = f"{dipo.device}, {th.get_num_threads()} threads"
    print(f"{args.env}, batch {args.batch_size}, K = {args.denoising_steps}, {device}, torch {th.__version__}")
    observation = dipo.observation_space.sample()
    for name, calls in (
        ("update", [lambda: dipo.train(1, args.batch_size), lambda: sac.train(1, args.batch_size)]),
        ("action", [lambda: dipo.predict(observation), lambda: sac.predict(observation)]),
    ):
        times = np.array([[milliseconds(call, dipo.device) for call in calls] for _ in range(args.repeats + 1)])[1:]
        ours, theirs = np.median(times, axis=0)
        ratio = np.median(times[:, 0] / times[:, 1])
        print(f"{name}: DIPO {ours:.1f} ms, SAC {theirs:.1f} ms, ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
