"""Copies of experts and the replanner that decides on them, from a config (parallel=fssdp)."""

import torch

from moetrain.comm.mesh import Mesh
from moetrain.config.build import build
from moetrain.config.schema import Config
from moetrain.model.build import plan_homes, sliced_experts
from moetrain.model.parallelize import copy_experts
from moetrain.model.transformer import Transformer
from moetrain.parallel.fssdp.copies import CopyManager
from moetrain.parallel.fssdp.replanner import PlanningInputs, ReplanIntervals, Replanner
from moetrain.plan.calibration import calibrate
from moetrain.plan.cost.machine import Costs, Topology
from moetrain.plan.loads.forecast import LoadForecaster, forecast_of


def build_fssdp(config: Config, model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh) -> tuple[CopyManager, Replanner]:
    """Copies of all layers and their replanner, with every expert at its home."""
    planning_inputs = survey(config, model, mesh)
    copies = copy_experts(model, mesh, rematerialize=config.parallel.rematerialize, form=config.parallel.collective,
                          topology=planning_inputs.topology)
    intervals = ReplanIntervals(config.parallel.rehome_interval, sliced_experts(config.parallel, mesh))
    planning = Replanner(model.moe_layers, optimizer, mesh, copies, plan_homes(config.model, mesh["ep"].size),
                        build(config.planner, "planner"), planning_inputs, look_ahead(config, model), intervals,
                        calibrate if config.parallel.calibrate else None)
    return copies, planning


def look_ahead(config: Config, model: Transformer) -> LoadForecaster:
    """How the loads of the next step are forecast."""
    parallel = config.parallel
    forecast = forecast_of(parallel.forecast, sum(model.routers.values()), parallel.window)
    # Thousandths: ranks compare integers, so that all of them decide alike.
    return LoadForecaster(forecast, model.routers, round(1000 * parallel.max_forecast_error))


def survey(config: Config, model: Transformer, mesh: Mesh) -> PlanningInputs:
    """What planners are told of the machine. All of it from the config: ranks plan alike."""
    hardware, sizes = config.hardware, config.model
    topology = Topology(mesh["ep"].size, min(mesh["node"].size, mesh["ep"].size))
    numbers, element = 3 * sizes.dim * sizes.expert_dim, model.dtype.itemsize
    tokens = config.train.global_batch * config.train.seq_len / mesh["batch"].size
    attention = 2 * tokens * (4 * sizes.dim ** 2 + 2 * config.train.seq_len * sizes.dim)      # operations, forward, roughly
    costs = Costs(row_s=6 * numbers / hardware.flops, row_bytes=sizes.dim * element, expert_bytes=numbers * element,
                  inside=hardware.inside, between=hardware.between, latency_s=hardware.latency_s,
                  hidden_s=attention / hardware.flops, collective=config.parallel.collective)
    return PlanningInputs(topology, costs, config.parallel.max_copies)
