"""Training: ``python -m fastalign.train CONFIG.yaml key.sub=value ...``, alone or under torchrun.

``--reference-config FILE`` instead of CONFIG.yaml takes one of the authors' files.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastalign.config import Config, load_config, to_yaml
from fastalign.evaluation.during_training import contents, due, open_splits, probe_student
from fastalign.evaluation.pairs import LabelledImages
from fastalign.method.flops import flops_per_image
from fastalign.training import distributed
from fastalign.training.command import report_rank_error, run_command
from fastalign.training.faults import bad_validation_samples, look_back, react
from fastalign.training.memory import keep_freed_memory
from fastalign.training.metrics import MetricLog, Speed, Terminal
from fastalign.training.optim import learning_rate, seed_update, step_unless
from fastalign.training.preemption import Preemption, clear_marker
from fastalign.training.run import Run
from fastalign.training.saving import finish, improves, leave, save, save_settings
from fastalign.training.spikes import Spikes
from fastalign.training.validation import evaluate, measure_target_scale
from fastalign.training.watchdog import Watchdog, patience
from fastalign.utils.errors import UserError
from fastalign.utils.files import can_be_folder
from fastalign.utils.paths import path_argument

Splits = dict[str, LabelledImages]


def update(run: Run, batches, epoch: int) -> dict[str, Tensor | float]:
    """One update of the weights. Returns measurements that are still on the device."""
    optim = run.config.optim
    min_lr = optim.lr / 10 if optim.min_lr is None else optim.min_lr
    warmup = round(optim.warmup_epochs * run.epoch_steps)
    lr = learning_rate(run.step, total=run.total_steps, warmup=warmup, lr=optim.lr, min_lr=min_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    seed_update(run.config.seed, run.step, run.world.rank)
    total, waited = torch.zeros((), device=run.world.device), 0.0
    ids, found = [], []
    with run.fixed_weights():
        for part in range(optim.accumulate):
            run.beat("waiting for data")
            batch = next(batches)
            run.beat("computing")
            waited += batch.wait
            ids.append(batch.ids_host)
            found += (sample for sample in batch.bad if sample.id not in run.bad)
            lengths_known = run.objective.fixed_lengths
            sample_ids = batch.ids if lengths_known else torch.from_numpy(batch.ids_host)
            last = part == optim.accumulate - 1
            with run.accumulating(last):
                with run.autocast():
                    loss = run.model(batch.images, sample_ids, epoch) / optim.accumulate
                loss.backward()
            total += loss.detach()
    loss = run.status.share(total, signal=run.reason_to_leave, bad=len(found), overdue=run.overdue)
    norm = run.clip()
    skip = run.status.judge(norm)
    step_unless(run.optimizer, skip)
    run.optimizer.zero_grad()
    if run.average:
        run.average.update()
    run.step += 1
    run.status.post(run.step, skip, np.concatenate(ids), tuple(found))
    return {"loss": loss, "grad_norm": norm, "lr": lr, "waited": waited}


def train(config: Config, world: distributed.World) -> None:
    """Run a configuration to its end, from wherever its folder stands.

    Raises:
        Preempted: a signal asked the run to leave, and it has saved.
        LostConnection: another rank is gone.
        UserError: bad input.
    """
    with Preemption() as preemption:
        can_be_folder(f"output={config.output}", config.output)
        if world.main:
            clear_marker(Path(config.output))
        splits = open_splits(config, world)
        run = Run(config, world, also=contents(splits))
        run.preemption = preemption
        if world.main and not run.finished:
            save_settings(run)
        timeout, checkpoints = config.faults["timeout"], run.checkpoints
        with Watchdog(world, timeout, run.step, saved=lambda: checkpoints.newest_step) as run.watchdog:
            follow(run, splits)


def follow(run: Run, splits: Splits) -> None:
    """From the first line on the terminal to the last."""
    config, world = run.config, run.world
    log = MetricLog(
        run.folder,
        step=run.step or -1,
        judged=not run.owes_judgement,
        main=world.main,
        sinks=config.log.to,
    )
    terminal = Terminal(total=run.last_step, step=run.step, main=world.main)
    try:
        with report_rank_error(world.rank):
            for note in run.notes:
                terminal.say(note)
            look_back(run, terminal)
            if run.step == 0:
                begin(run, splits, log, terminal)
            elif run.finished:
                terminal.say(
                    f"{run.folder} is finished: step {run.step} of {run.last_step}, nothing to train"
                )
            else:
                terminal.say(f"resuming {run.folder} at step {run.step} of {run.last_step}")
            if run.forced:
                measure_target_scale(run)
            loop(run, splits, log, terminal)
            finish(run)
            if (run.folder / "backbone.json").exists():
                terminal.say(f"aligned backbone: {run.folder / 'backbone.safetensors'}")
    finally:
        with contextlib.suppress(UserError):
            run.checkpoints.wait()  # a run that ends badly still has what it was writing
        terminal.close()
        log.close()
        for loader in (run.train, run.val):
            if loader is not None:
                loader.close()


def begin(run: Run, splits: Splits, log: MetricLog, terminal: Terminal) -> None:
    """Before the first step: the target scale, and the loss and the probe of the untrained student."""
    measure_target_scale(run)
    terminal.say(f"target scale {run.objective.target_scale.item():.4g}")
    if run.val is not None:
        validate(run, log, terminal, epoch=0)
    if due(run):
        probe(run, splits, log, terminal, epoch=0)


def validate(run: Run, log: MetricLog, terminal: Terminal, epoch: int) -> None:
    """Evaluate and tell."""
    run.val_loss = evaluate(run)
    bad_validation_samples(run, terminal)
    log.add(step=run.step, epoch=epoch, val_loss=run.val_loss)
    terminal.say_compiled(log.flush())
    terminal.say(f"step {run.step}: validation loss {run.val_loss:.4f}")


def probe(run: Run, splits: Splits, log: MetricLog, terminal: Terminal, epoch: int) -> None:
    """Probe and tell."""
    found = probe_student(run, splits)
    run.probed = {"step": run.step, **found}
    log.add(step=run.step, epoch=epoch, **{f"probe_{name}": value for name, value in found.items()})
    terminal.say_compiled(log.flush())  # what was compiled before the first step, without validation
    recall, precision = (f"{100 * found[name]:.1f}" for name in ("macro_recall", "map"))
    terminal.say(f"step {run.step}: probe macro recall {recall}, mAP {precision}, loss {found['loss']:.4f}")


def loop(run: Run, splits: Splits, log: MetricLog, terminal: Terminal) -> None:
    """Train epoch by epoch, and judge each."""
    speed = Speed(
        images=run.config.optim.batch_size,
        ranks=run.world.size,
        flops=flops_per_image(run.objective),
        device=run.world.device,
    )
    spikes = Spikes()
    terminal.begin()
    run.preemption.hold_interrupts()
    run.model.train()
    while run.owes_judgement or run.step < run.last_step:
        if not run.owes_judgement:
            train_epoch(run, splits, log, terminal, speed, spikes)
        judge(run, splits, log, terminal)


def judge(run: Run, splits: Splits, log: MetricLog, terminal: Terminal) -> None:
    """At the end of an epoch or of the run: validate, probe, save."""
    epoch = (run.step - 1) // run.epoch_steps
    if run.val is not None:
        validate(run, log, terminal, epoch)
    if due(run):
        probe(run, splits, log, terminal, epoch)
    run.judged_at = run.step
    save(run, evaluated=run.val is not None)


def train_epoch(
    run: Run, splits: Splits, log: MetricLog, terminal: Terminal, speed: Speed, spikes: Spikes
) -> None:
    """From where the run stands to the end of the epoch: update, report, probe, save."""
    config = run.config
    epoch, position = divmod(run.step, run.epoch_steps)
    end = min(run.last_step, (epoch + 1) * run.epoch_steps)
    with contextlib.closing(run.train.batches(epoch, start=position * config.optim.accumulate)) as batches:
        speed.start()
        while run.step < end:
            metrics = update(run, batches, epoch)
            speed.tick(metrics.pop("waited"))
            log.add(step=run.step, epoch=epoch, **metrics)
            inside = run.step != end
            saving = inside and run.step % (config.checkpoint.every_steps or run.last_step + 1) == 0
            probing = inside and due(run)
            # Before saving: no checkpoint has more behind it than what was told and written down.
            signal, overdue = react(run, terminal, everything=saving or probing or not inside)
            if signal or overdue:
                react(run, terminal, everything=True)
            saving = saving or (inside and overdue)
            if saving or probing or signal or not inside or run.step % config.log.every_steps == 0:
                report(log.flush(speed), terminal, spikes)
            if signal:
                leave(run, signal)
            if probing:
                probe(run, splits, log, terminal, epoch)
            if saving or (probing and improves(run)):
                save(run)
            if saving or probing:
                speed.start()


def report(lines: list[dict], terminal: Terminal, spikes: Spikes) -> None:
    """Show the newest line, and every loss that leaps up."""
    terminal.say_compiled(lines)
    for line in lines:
        usual = None if line["loss"] is None else spikes.told(line["loss"])
        if usual is not None:
            terminal.say(f"step {line['step']}: the loss leapt to {line['loss']:.4f}, from about {usual:.4f}")
    if lines:
        terminal.show(lines[-1])


def _configuration(options: argparse.Namespace) -> tuple[Config, list[str]]:
    """The configuration that the command asks for, and what one should know about it."""
    if options.reference_config is None:
        if options.world_size is not None:
            raise UserError(
                "--world-size goes with --reference-config: a recipe's optim.batch_size is over all GPUs"
            )
        if "=" in options.config and not Path(options.config).exists():
            raise UserError(
                f"{options.config}: the recipe comes first, as in configs/demo.yaml {options.config}"
            )
        return load_config(options.config, options.overrides), []
    if options.world_size is not None and options.world_size < 1:
        raise UserError(f"--world-size must be at least 1, got {options.world_size}")
    from fastalign.compat.reference_config import read_reference  # with timm, a second's import

    overrides = [*([options.config] if options.config else []), *options.overrides]
    return read_reference(options.reference_config, overrides, world_size=options.world_size)


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code: 0, 2 for bad input, 70 for a lost or hung rank, 75 for a signal, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m fastalign.train", description="Align a backbone with MaskEmbed."
    )
    parser.add_argument("config", nargs="?", type=path_argument, help="a recipe, such as configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the recipe")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    parser.add_argument(
        "--reference-config",
        type=path_argument,
        metavar="FILE",
        help="a YAML file of the authors' code, instead of a recipe",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="GPUs that FILE's batch is for (torchrun's, else 4)"
    )
    options = parser.parse_intermixed_args(arguments)
    if not options.config and not options.reference_config:
        parser.error("give a recipe, or --reference-config FILE")
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    config, notes = _configuration(options)
    if options.print_config:
        print("".join(f"# {note}\n" for note in notes) + to_yaml(config, comments=True), end="")
        return
    if int(os.environ.get("RANK", 0)) == 0:
        print("".join(f"{note}\n" for note in notes), end="", flush=True)
    train(config, distributed.start(patience(config.faults["timeout"])))


if __name__ == "__main__":
    if not torch.cuda.is_available():
        keep_freed_memory()
    sys.exit(main())
