"""One training run: AdamW with a cosine schedule, EMA, and a state on disk
from which an interrupted run goes on exactly where it was."""

import math
import time
from dataclasses import dataclass

import torch


@dataclass
class Plan:
    name: str
    steps: int
    rate: float
    seed: int = 0
    warmup: int = 100
    save_every: int = 100
    floor: float = 0.01  # of the rate, as a share of its peak


class Training:
    """Trains `parameters` in place; `loss_of(step, generator)` gives the loss.

    The generator depends on the seed and the step alone, so that a resumed
    run draws what an undisturbed one would have drawn.
    """

    def __init__(self, plan, parameters, work):
        self.plan = plan
        self.parameters = [p for p in parameters if p.requires_grad]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, plan.rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.work, self.step, self.losses, self.began = work, 0, [], time.time()
        self.resume()

    @property
    def path(self):
        return self.work / f"{self.plan.name}.state"

    def run(self, loss_of, after_save=None):
        while self.step < self.plan.steps:
            generator = torch.Generator().manual_seed(self.plan.seed * 1_000_000 + self.step)
            self.update(loss_of(self.step, generator))
            if self.step % self.plan.save_every == 0 or self.step == self.plan.steps:
                self.report()
                self.save()
                if after_save:
                    after_save(self)
        self.use_average()

    def update(self, loss):
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self.losses.append(loss.item())

    def rate(self):
        done = self.step / self.plan.steps
        warm = min(1.0, (self.step + 1) / self.plan.warmup)
        return self.plan.rate * warm * (self.plan.floor + 0.5 * (1 + math.cos(math.pi * done)))

    def report(self):
        mean = sum(self.losses) / len(self.losses)
        pace = (time.time() - self.began) / len(self.losses)
        log(self.work, f"{self.plan.name} step {self.step} loss {mean:.4f} ({pace:.2f} s a step)")
        self.losses, self.began = [], time.time()

    def save(self):
        state = {"step": self.step, "parameters": self.parameters, "average": self.average,
                 "optimizer": self.optimizer.state_dict()}
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def resume(self):
        if not self.path.exists():
            return
        state = torch.load(self.path)
        self.step, self.average = state["step"], state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.fill(state["parameters"])

    def use_average(self):
        self.fill(self.average)

    def fill(self, values):
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, list(values))


def log(work, line):
    print(line, flush=True)
    with open(work / "train.log", "a") as file:
        file.write(line + "\n")
