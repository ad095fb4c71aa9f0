"""Construction of a run from its config: everything that a training step needs on this rank.

The ranks have joined before (session.py). Checkpoints are read afterwards (start.py).
"""

from pathlib import Path

from moetrain.comm.agreement import all_or_none
from moetrain.comm.mesh import Mesh
from moetrain.config.build import build
from moetrain.config.rules.model import model_vocabulary
from moetrain.config.schema import Config
from moetrain.losses.language import LanguageLoss
from moetrain.model.build import ConvertModel, build_model
from moetrain.model.flops import peak_tokens_per_s
from moetrain.model.parallelize import parallelize
from moetrain.routers.context import refuse_other_domains
from moetrain.train.count_pool import PreviousStepCounts
from moetrain.train.data_setup import set_up_data
from moetrain.train.fssdp_setup import build_fssdp
from moetrain.train.loggers.router_dump import RouterDump
from moetrain.train.memory.fit import refuse_what_cannot_fit
from moetrain.train.objective import build_objective, check_language_loss
from moetrain.train.optim.optimizer import allocate_state, build_optimizer
from moetrain.train.state import Graphs, Run, TrainState


def set_up(config: Config, directory: Path, mesh: Mesh, convert_model: ConvertModel | None = None,
           language_loss: LanguageLoss | None = None) -> Run:
    """Build data, model, optimizer and objective, at step 0. Collective: rank 0 prepares the data.

    Args:
        config: the config of the run, with a concrete dtype.
        directory: directory of the run.
        mesh: all ranks.
        convert_model: changes the model before it is sharded (model/build.py).
        language_loss: takes the place of the one that the config chooses (losses/language.py).

    Returns:
        The run, at step 0.
    """
    language_loss = build(config.language_loss, "language_loss") if language_loss is None else language_loss
    check_language_loss(config, language_loss, mesh["batch"].size)
    all_or_none(mesh["batch"], lambda: refuse_what_cannot_fit(config, mesh))
    dataset, loader = set_up_data(config, directory, mesh)
    vocab_size = model_vocabulary(config.model, dataset.vocab_size)
    model = build_model(config, vocab_size, mesh, convert_model)
    refuse_other_domains(model, dataset.domains)
    optimizer = build_optimizer(model, config.optim)
    allocate_state(optimizer)
    copies, replanner = (build_fssdp(config, model, optimizer, mesh)
                         if config.parallel.mode == "fssdp" and model.banks else (None, None))
    objective = build_objective(config, len(model.routers), language_loss)
    previous = None
    if objective.pool is not None and objective.pool.mode == "warm":
        previous = PreviousStepCounts(model.num_choices, objective.losses["balance"].drift, mesh.device)
    return Run(
        config, directory, mesh, dataset, loader,
        state=TrainState(model, optimizer, planning=replanner, prior=previous),
        parallel=parallelize(model, mesh, copies),
        objective=objective,
        graphs=Graphs(kept=not config.train.count_pass),
        dump=RouterDump(directory, mesh, dataset.domains) if config.log.router_dump else None,
        peak_tokens_per_s=peak_tokens_per_s(config, vocab_size, mesh),
    )
