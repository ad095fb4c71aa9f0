"""Construction of FSSDP (parallel=fssdp) from a config: copies of experts, and their replanner."""

import torch

from moetrain.comm.mesh import Mesh
from moetrain.config.build import build
from moetrain.config.schema import Config
from moetrain.model.build import sliced_experts
from moetrain.model.parallelize import copy_experts
from moetrain.model.transformer import Transformer
from moetrain.moe.expert_form import ExpertForm
from moetrain.parallel.fssdp.copies import CopyManager
from moetrain.parallel.fssdp.replanner import PlanningInputs, ReplanIntervals, Replanner
from moetrain.plan.calibration import calibrate
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.loads.forecast import LoadForecaster, forecast_of
from moetrain.plan.placement import ExpertPlacement


def build_fssdp(config: Config, model: Transformer, optimizer: torch.optim.Optimizer,
                mesh: Mesh) -> tuple[CopyManager, Replanner]:
    """Build the copy manager of all banks and the replanner; every expert is at its home, without copies.

    Args:
        config: the config of the run.
        model: this rank's part of the model, with a bank of experts or more.
        optimizer: its optimizer, whose moments move with an expert's home.
        mesh: all ranks.

    Returns:
        The manager of copies, and the replanner.
    """
    planning_inputs = survey(config, model, mesh)
    copies = copy_experts(model, mesh, rematerialize=config.parallel.rematerialize,
                          form=config.parallel.collective, topology=planning_inputs.topology)
    intervals = ReplanIntervals(config.parallel.rehome_interval, sliced_experts(config.parallel, mesh))
    placement = ExpertPlacement(tuple((name, experts.dispatcher.placement)
                                      for name, experts in model.banks.items()))
    planning = Replanner(model.banks, model.feeds, optimizer, mesh, copies, placement,
                         build(config.planner, "planner"), planning_inputs, look_ahead(config, placement),
                         intervals, calibrate if config.parallel.calibrate else None)
    return copies, planning


def look_ahead(config: Config, placement: ExpertPlacement) -> LoadForecaster:
    """Build the forecaster of the loads of the next step, for the banks of a placement."""
    parallel, sizes = config.parallel, {name: homes.num_experts for name, homes in placement.layers}
    forecast = forecast_of(parallel.forecast, sum(sizes.values()), parallel.window)
    # In thousandths: integers, so that all ranks decide alike.
    return LoadForecaster(forecast, sizes, round(1000 * parallel.max_forecast_error))


def survey(config: Config, model: Transformer, mesh: Mesh) -> PlanningInputs:
    """Derive the inputs of planners: topology, costs, and the limit on copies.

    All of them come from config and mesh, so every rank plans the same.

    Args:
        config: the config, with the speeds of section `hardware`.
        model: the model, for the forms of its experts and the dtype of activations.
        mesh: all ranks.

    Returns:
        The inputs of planners besides loads.
    """
    hardware, dim = config.hardware, config.model.dim
    topology = Topology(mesh["ep"].size, min(mesh["node"].size, mesh["ep"].size))
    tokens = config.train.global_batch * config.train.seq_len / mesh["batch"].size
    # Operations of attention in the forward pass, roughly.
    attention = 2 * tokens * (4 * dim ** 2 + 2 * config.train.seq_len * dim)
    element = model.dtype.itemsize

    def costs(form: ExpertForm) -> Costs:
        # Backward has twice the operations of forward.
        return Costs(row_s=3 * form.row_flops / hardware.flops, row_bytes=dim * element,
                     expert_bytes=form.numbers * element, inside=hardware.inside, between=hardware.between,
                     latency_s=hardware.latency_s, hidden_s=attention / hardware.flops,
                     collective=config.parallel.collective)

    of_banks = {name: costs(experts.bank.form) for name, experts in model.banks.items()}
    return PlanningInputs(topology, of_banks, config.parallel.max_copies)
