"""Train DIPO on one task, see what it has learned, and film it.

    python examples/train.py
    python examples/train.py --env Hopper-v5 --timesteps 100000 --learning-starts 10000 --learning-rate 3e-4

The agent has the recommended setting. Everything that is written goes into one folder, by default runs/<env>. Ctrl-C ends the
training early and keeps the agent.
"""

import argparse
import logging
import os
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
from PIL import Image
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_dipo import DIPO, RECOMMENDED

# Pendulum-v1 is learned within these steps. Larger tasks need 100,000 and more, with 10,000 random ones and DIPO's own
# learning rate, 3e-4.
ENV = "Pendulum-v1"
TIMESTEPS = 3_500
LEARNING_STARTS = 500
LEARNING_RATE = 1e-3
EPISODES = 10
HEIGHT = 200  # of the GIF, in pixels


def random_return(env: gym.Env) -> float:
    """Mean return of actions drawn at random."""
    total = 0.0
    for _ in range(EPISODES):
        env.reset()
        done = False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += float(reward)
            done = terminated or truncated
    return total / EPISODES


def mean_return(model: DIPO, env: gym.Env) -> float:
    """Mean return of the agent when it explores no more."""
    returns, _ = evaluate_policy(model, env, n_eval_episodes=EPISODES, return_episode_rewards=True)
    return float(np.mean(returns))


def film(model: DIPO, env_id: str, seed: int) -> list[Image.Image]:
    """The pictures of one episode, at most 200 of them; none where this machine cannot draw the task."""
    frames: list[Image.Image] = []
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory, and looks for no screen
    try:
        env = gym.make(env_id, render_mode="rgb_array")
        obs, _ = env.reset(seed=seed)
        done = False
        while not done and len(frames) < 200:
            picture = Image.fromarray(np.asarray(env.render()))
            frames.append(picture.resize((HEIGHT * picture.width // picture.height, HEIGHT)))
            action, _ = model.predict(obs, deterministic=True)
            obs, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        env.close()
    except Exception as error:  # no OpenGL, most often
        print(f"There will be no GIF, as {env_id} cannot be drawn here: {error}")
    return frames


def write_gif(path: Path, before: list[Image.Image], after: list[Image.Image], fps: int = 30) -> None:
    """Both episodes side by side; what ends first stands still."""
    pictures = []
    for i in range(max(len(before), len(after))):
        pair = [frames[min(i, len(frames) - 1)] for frames in (before, after)]
        picture = Image.new("RGB", (sum(each.width for each in pair) + 10, HEIGHT), "white")
        picture.paste(pair[0], (0, 0))
        picture.paste(pair[1], (pair[0].width + 10, 0))
        pictures.append(picture.quantize(64))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1_000 // fps, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--env", default=ENV, help="a Gymnasium task with continuous actions (%(default)s)")
    parser.add_argument("--timesteps", type=int, default=TIMESTEPS, help="environment steps to train for (%(default)s)")
    parser.add_argument("--learning-starts", type=int, default=LEARNING_STARTS, help="random ones among them (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of actor and critics (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same run (%(default)s)")
    parser.add_argument("--save-to", type=Path, help="folder for all that is written (runs/<env>)")
    args = parser.parse_args()
    folder: Path = args.save_to or Path("runs") / args.env
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=folder / "warnings.log")
    mujoco.set_mju_user_warning(logging.warning)  # otherwise MuJoCo writes a file of its own, wherever it is started from

    # Two environments: one to learn in, whose episodes are logged to monitor.csv, and one to be judged in.
    env = Monitor(gym.make(args.env), filename=str(folder / "monitor.csv"))
    eval_env = Monitor(gym.make(args.env))
    eval_env.reset(seed=args.seed + 1)
    eval_env.action_space.seed(args.seed + 1)

    model = DIPO(
        "MlpPolicy",
        env,
        learning_starts=args.learning_starts,
        learning_rate=args.learning_rate,
        seed=args.seed,
        **RECOMMENDED,
    )
    at_random, before = random_return(eval_env), mean_return(model, eval_env)
    print(f"{args.env}, mean return of {EPISODES} episodes: {at_random:.1f} at random, {before:.1f} before training.")
    untrained = film(model, args.env, args.seed)

    try:
        model.learn(args.timesteps, progress_bar=True)
    except KeyboardInterrupt:
        print(f"\nInterrupted after {model.num_timesteps:,} steps: what was learned until then is kept.")
    path = folder / "dipo.zip"
    model.save(path)

    after = mean_return(model, eval_env)
    print(f"{args.env}, mean return of {EPISODES} episodes: {after:.1f} after {model.num_timesteps:,} steps.")
    if untrained:
        gif = folder / "before_and_after.gif"
        write_gif(gif, untrained, film(model, args.env, args.seed))
        print(f"One episode before the training and the same one after it: {gif}")
    print("\nThe agent is saved. To use it:")
    print("    from sb3_dipo import DIPO")
    print(f'    model = DIPO.load("{path}")')
    print("    action, _ = model.predict(observation, deterministic=True)")


if __name__ == "__main__":
    main()
