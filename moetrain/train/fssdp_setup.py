"""Construction of FSSDP (parallel=fssdp) from a config: copies of experts, and their replanner."""

import torch

from moetrain.comm.mesh import Mesh
from moetrain.config.build import build
from moetrain.config.schema import Config
from moetrain.model.build import plan_homes, sliced_experts
from moetrain.model.parallelize import copy_experts
from moetrain.model.transformer import Transformer
from moetrain.moe.expert_form import ExpertForm
from moetrain.parallel.fssdp.copies import CopyManager
from moetrain.parallel.fssdp.replanner import PlanningInputs, ReplanIntervals, Replanner
from moetrain.plan.calibration import calibrate
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.loads.forecast import LoadForecaster, forecast_of


def build_fssdp(config: Config, model: Transformer, optimizer: torch.optim.Optimizer,
                mesh: Mesh) -> tuple[CopyManager, Replanner]:
    """Build the copy manager of all layers and the replanner; every expert is at its home, without copies.

    Args:
        config: the config of the run.
        model: this rank's part of the model.
        optimizer: its optimizer, whose moments move with an expert's home.
        mesh: all ranks.

    Returns:
        The manager of copies, and the replanner.
    """
    planning_inputs = survey(config, model, mesh)
    copies = copy_experts(model, mesh, rematerialize=config.parallel.rematerialize,
                          form=config.parallel.collective, topology=planning_inputs.topology)
    intervals = ReplanIntervals(config.parallel.rehome_interval, sliced_experts(config.parallel, mesh))
    planning = Replanner(model.moe_layers, optimizer, mesh, copies,
                         plan_homes(config.model, mesh["ep"].size), build(config.planner, "planner"),
                         planning_inputs, look_ahead(config, model), intervals,
                         calibrate if config.parallel.calibrate else None)
    return copies, planning


def look_ahead(config: Config, model: Transformer) -> LoadForecaster:
    """Build the forecaster of the loads of the next step."""
    parallel = config.parallel
    forecast = forecast_of(parallel.forecast, sum(model.routers.values()), parallel.window)
    # In thousandths: integers, so that all ranks decide alike.
    return LoadForecaster(forecast, model.routers, round(1000 * parallel.max_forecast_error))


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

    of_layers = {name: costs(moe.experts.bank.form) for name, moe in model.moe_layers.items()}
    return PlanningInputs(topology, of_layers, config.parallel.max_copies)
