"""Worker: whole RL steps of TRL's GRPOTrainer.

The trainer owns its loop, so a callback waits for the next request at the end of each step. Differences
from the trainer's defaults: float32 instead of bfloat16, no gradient checkpointing (it would only cost
time here), no shuffling, no files and no progress bars. The end of a sequence is a token outside the
model's vocabulary, so that no response stops early.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.peers import protocol, work
from benchmarks.peers.pytorch import load

PACKAGES = "torch", "transformers", "trl", "accelerate"
STEPS = 1_000_000  # More than are ever requested.


class Steps(TrainerCallback):
    """Replies after each step and waits for the next request.

    Args:
      server: the worker's side of the protocol.
      rewards: the reward function, which keeps what is reported.
    """

    def __init__(self, server: protocol.Server, rewards: work.Rewards):
        self._server, self._rewards = server, rewards

    def on_step_end(self, args, state, control, **_):
        """Called by the trainer after the optimizer's update."""
        self._server.reply(self._rewards.read())
        control.should_training_stop = self._server.receive() is None


def trainer_config(shape: work.Shape, micro_batch: int, directory: Path) -> GRPOConfig:
    """Returns the trainer's config for a shape."""
    return GRPOConfig(
        output_dir=str(directory),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=shape.sequences // micro_batch,
        num_generations=shape.samples,
        max_completion_length=shape.response,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        epsilon=work.EPSILON,
        learning_rate=work.LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=work.B1,
        adam_beta2=work.B2,
        adam_epsilon=work.EPS,
        weight_decay=work.WEIGHT_DECAY,
        max_grad_norm=work.CLIP_NORM,
        max_steps=STEPS,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=STEPS,
    )


def main(task: dict[str, Any]) -> None:
    """Serves steps."""
    torch.set_num_threads(task["threads"])
    server, directory = protocol.Server(PACKAGES), Path(task["directory"])
    settings, shape = task["settings"], work.Shape(**task["shape"])
    # Both special tokens get ids after the vocabulary of the model.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "model/tokenizer.json"), eos_token="<eos>", pad_token="<pad>"
    )
    rewards = work.Rewards(shape.response)

    def reward(completions, **_):
        return rewards(completions)

    trainer = GRPOTrainer(
        model=load(directory, settings),
        reward_funcs=reward,
        args=trainer_config(shape, settings["micro_batch"], directory / "trl"),
        train_dataset=Dataset.from_dict({"prompt": work.read_prompts(directory)}),
        processing_class=tokenizer,
        callbacks=[Steps(server, rewards)],
    )
    server.ready()
    if server.receive() is not None:
        trainer.train()


if __name__ == "__main__":
    protocol.run(main)
