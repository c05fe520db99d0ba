"""Training: ``fastalign train RECIPE section.key=value ...``, or ``torchrun -m fastalign.train RECIPE ...``."""

import argparse
import contextlib
import math
import sys
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from fastalign.backbones.precision import autocast
from fastalign.backbones.vit import ViT
from fastalign.config import Config, load_config, to_yaml
from fastalign.evaluation.label_maps import LabelledImages
from fastalign.evaluation.patches import contents, open_splits, probe_encoder
from fastalign.method.flops import flops_per_image
from fastalign.training import distributed
from fastalign.training.checkpoint import new_best, resume, save, save_settings, wait_for_checkpoint
from fastalign.training.command import MARKER, WAITING, Preempted, Preemption, report_rank_error, run_command
from fastalign.training.dry_run import dry_run, set_micro_batch
from fastalign.training.faults import handle_status, prepare_logs
from fastalign.training.metrics import Speed
from fastalign.training.reporter import Reporter, end_lines, start_lines
from fastalign.training.run import Run, itstime
from fastalign.training.update import seed_update
from fastalign.training.validation import measure_target_scale, validate
from fastalign.utils.errors import UserError
from fastalign.utils.files import lock_folder, user_path, wrap_io_errors

Splits = dict[str, LabelledImages]
HELP = """
examples:
  fastalign train clip-vit-b data.train=/data/train data.val=/data/val
  fastalign train student.name=vit_base_patch16_dinov3.lvd1689m data.train=/data/train output=runs/mine --dry-run

sections of keys (--print-config prints every key, its values and what it does):
"""
HELP += textwrap.fill(", ".join(Config.model_fields), 78, initial_indent="  ", subsequent_indent="  ")


def update(run: Run, batches, epoch: int) -> dict[str, Tensor | float]:
    """One update of the weights. Returns metrics that are still on the device."""
    state, optim = run.state, run.config.optim
    lr = run.set_learning_rate()
    seed_update(run.config.seed, state.step, run.world.rank)
    total, waited = torch.zeros((), device=run.world.device), 0.0
    ids, bad = [], []
    with run.cached_autocast():
        for part in range(optim.accumulate):
            run.beat("waiting for data")
            batch = next(batches)
            run.beat("computing")
            waited += batch.wait
            ids.append(batch.ids)
            bad += (sample for sample in batch.bad if sample.id not in state.bad)
            sync = part == optim.accumulate - 1 or run.world.size == 1  # gradients, in the last pass only
            with contextlib.nullcontext() if sync else run.model.no_sync():
                with autocast(run.world.device, run.dtype):
                    loss = run.model(batch.images, batch.ids, epoch) / optim.accumulate
                loss.backward()
            total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(run.trained, optim.clip or math.inf)
    loss, skip = run.status.exchange(total, norm, run.own_status(torch.cat(ids).numpy(), bad))
    run.optimizer.found_inf = skip.float()  # on the device: a skipped update keeps weights and moments
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.average:
        run.average.update()
    state.step += 1
    return {"loss": loss, "grad_norm": norm, "lr": lr, "waited": waited}


def check_exports(config: Config, vit: ViT | None = None) -> None:
    """UserError if a target of `export.to` is unknown, lacks its library, or does not fit the backbone."""
    if config.export.to:
        from fastalign.export.targets import check_names, find_target  # imports the libraries

        check_names(config.export.to, "export.to")
        for target in config.export.to if vit else ():
            find_target(target, vit, "export.to")


def train(config: Config, world: distributed.World) -> None:
    """Train from the newest checkpoint, if any, to the end of the run. Raises Preempted after a signal."""
    with Preemption() as preemption:
        if world.main:
            (Path(config.output) / MARKER).unlink(missing_ok=True)
        check_exports(config)  # before weights are loaded
        config = set_micro_batch(config, world, update)
        splits = open_splits(config, world)
        run = Run(config, world, preemption=preemption, labelled=contents(splits))
        check_exports(config, run.backbone)
        with lock_folder(run.folder) if world.main else contextlib.nullcontext():
            changes, notes = resume(run)
            if world.main and not run.finished:
                save_settings(run)
            run.beat("starting")
            with run.hang_timer:
                run_training(run, splits, notes=notes, new_scale=bool(changes))


def run_training(run: Run, splits: Splits, *, notes: list[str], new_scale: bool) -> None:
    """Evaluate, train, save and report."""
    config, world, state = run.config, run.world, run.state
    flops, images = flops_per_image(run.objective), config.optim.batch_size
    speed = Speed(images=images, ranks=world.size, flops=flops, device=world.device)
    steps = {"step": state.step, "total": run.last_step, "epoch": run.epoch_steps}
    options = {"evaluated": not run.eval_pending, "main": world.main, "sinks": config.log.to}
    reporter = Reporter(run.folder, speed, **steps, **options)
    try:
        with report_rank_error(world.rank):
            reporter.say("\n".join([*start_lines(run), *notes]))
            prepare_logs(run, reporter)
            if state.step == 0 or new_scale:
                measure_target_scale(run, reporter)
            if state.step == 0:
                with reporter.evaluating():
                    validate_and_probe(run, splits, reporter, epoch=0)
            train_loop(run, splits, reporter)
            wait_for_checkpoint(run)
            reporter.say("\n".join(end_lines(run)))
            if config.export.to and world.main:
                export_backbone(run, reporter)
    finally:
        with contextlib.suppress(UserError):
            run.checkpoints.wait()  # complete a checkpoint that is being written
        reporter.close()
        for loader in (run.train, run.val):
            if loader is not None:
                loader.close()


def export_backbone(run: Run, reporter: Reporter) -> None:
    """Export the aligned backbone to the targets of `export.to`, on rank 0, unless an earlier start has done so."""
    from fastalign.export import export
    from fastalign.export.write import is_exported

    for target in run.config.export.to:
        if is_exported(run.folder, target):
            reporter.say(f"already exported: {run.folder / 'exports' / target}")
            continue
        with run.hang_timer.paused():
            reporter.say(f"exported: {export(run.folder, target, say=reporter.say)[0]}")


def train_loop(run: Run, splits: Splits, reporter: Reporter) -> None:
    """Train epoch by epoch, with an evaluation and a checkpoint after each."""
    run.preemption.hold_interrupts()
    run.model.train()
    while not run.finished:
        if not run.eval_pending:
            train_epoch(run, splits, reporter)
        with reporter.evaluating():
            validate_and_probe(run, splits, reporter, (run.state.step - 1) // run.epoch_steps)
            run.state.last_eval_step = run.state.step
            save(run)


def train_epoch(run: Run, splits: Splits, reporter: Reporter) -> None:
    """Train from the run's step to the end of its epoch: update, log, probe, save."""
    config, state = run.config, run.state
    epoch, position = divmod(state.step, run.epoch_steps)
    end = min(run.last_step, (epoch + 1) * run.epoch_steps)
    if run.should_probe and state.current_probe is None:  # a signal stopped the run before this probe
        probe(run, splits, reporter, epoch)
        if new_best(run) is not None:
            save(run)
    with contextlib.closing(run.train.batches(epoch, start=position * config.optim.accumulate)) as batches:
        reporter.speed.start()
        while state.step < end:
            metrics = update(run, batches, epoch)
            reporter.speed.tick(metrics.pop("waited"))
            reporter.update(state.step)
            reporter.add(step=state.step, epoch=epoch, **metrics)
            at_end = state.step == end
            saving = itstime(state.step, config.checkpoint.every_steps) and not at_end
            probing = run.should_probe and not at_end
            run.beat(WAITING)
            # Before saving, so that a checkpoint's bad samples and skipped updates are already recorded.
            stop, overdue = handle_status(run, reporter, everything=saving or probing or at_end)
            saving = saving or (overdue and not at_end)
            if saving or probing or stop or at_end or itstime(state.step, config.log.every_steps):
                reporter.flush()
            if stop:
                save(run)
                wait_for_checkpoint(run)
                if run.world.main:
                    with wrap_io_errors(run.folder / MARKER):
                        (run.folder / MARKER).write_text(f"{stop.name} at step {state.step}\n")
                raise Preempted(run.folder, stop, state.step)
            if probing:
                probe(run, splits, reporter, epoch)
            if saving or (probing and new_best(run) is not None):
                save(run)
            if saving or probing:
                reporter.speed.start()


def validate_and_probe(run: Run, splits: Splits, reporter: Reporter, epoch: int) -> None:
    """Validate and probe as configured, before the first update and after each epoch."""
    if run.val is not None:
        validate(run, reporter, epoch)
    if run.should_probe:
        probe(run, splits, reporter, epoch)


def probe_student(run: Run, splits: Splits, reporter: Reporter) -> dict[str, float]:
    """Probe the student's encoder on rank 0, while the others wait."""
    options = {"encoder": run.objective.student.encoder, "average": run.average and run.average.state}
    options |= {"dtype": run.dtype, "seed": run.config.seed, "threads": run.config.data.threads}
    options |= {"splits": splits, "track": reporter.track, "beat": lambda: run.beat("probing")}
    with contextlib.nullcontext() if run.world.main else run.hang_timer.paused():
        return distributed.on_first_rank(run.world, lambda: probe_encoder(device=run.world.device, **options))


def probe(run: Run, splits: Splits, reporter: Reporter, epoch: int) -> None:
    """Probe the student and report the scores."""
    step, scores = run.state.step, probe_student(run, splits, reporter)
    run.state.probed = {"step": step, **scores}
    reporter.add(step=step, epoch=epoch, **{f"probe_{name}": value for name, value in scores.items()})
    reporter.flush()
    recall, precision = (f"{100 * scores[name]:.1f}" for name in ("macro_recall", "map"))
    reporter.say(f"step {step}: probe macro recall {recall}, mAP {precision}, loss {scores['loss']:.4f}")


def main(arguments: list[str] | None = None) -> int:
    """The command's exit code: 0, 2 for bad input, 70 for a lost or hung rank, 75 for a signal, 130 for Ctrl-C."""
    about, raw = "Align a backbone with MaskEmbed.", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fastalign train", description=about, epilog=HELP, formatter_class=raw)
    add = parser.add_argument
    add("given", nargs="*", metavar="RECIPE section.key=value", help="recipe (name or file), keys to change")
    add("--print-config", action="store_true", help="print every key, its value and what it does, and exit")
    add("--dry-run", action="store_true", help="update on synthetic images; print memory, speed and duration")
    options = parser.parse_intermixed_args(arguments)
    if not (options.given or options.print_config):
        parser.error("give a recipe (`fastalign recipes` lists them) or keys")
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    recipes = [text for text in options.given if "=" not in text or Path(text).is_file()]
    if len(recipes) > 1:
        raise UserError(f"give one recipe, got {', '.join(recipes)}")
    overrides = [text for text in options.given if text not in recipes]
    config = load_config(user_path(recipes[0]) if recipes else None, overrides)
    if options.print_config:
        print(to_yaml(config, comments=True), end="")
        return
    world = distributed.start(distributed.collective_timeout(config.faults.timeout))
    if options.dry_run:
        check_exports(config)
        lines = dry_run(config, world, update, check_exports)
        if world.main:
            print("\n".join(lines))
    else:
        train(config, world)


if __name__ == "__main__":
    sys.exit(main())
