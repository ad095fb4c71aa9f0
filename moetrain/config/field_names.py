"""Names that other projects give to keys, options and verbs, for suggestions beyond edit distance.

They come from Hugging Face's Trainer and model configs, Megatron-LM, torchtitan, nanoGPT, Lightning and
DeepSpeed. An entry is what to type here: a key, or a whole override where an option of a group is meant.
"""

import re
from collections.abc import Sequence

# By the last part of a key, without underscores and dashes.
_KEYS: dict[str, str] = {
    "train.global_batch train.micro_batch": "batch batchsize globalbatchsize trainbatchsize",
    "train.micro_batch train.global_batch":
        "microbatchsize perdevicetrainbatchsize perdevicebatchsize trainmicrobatchsizepergpu "
        "gradientaccumulationsteps gradaccumsteps accumulategradbatches accumulation",
    "train.seq_len":
        "seqlength sequencelength seqlen maxlength maxseqlen maxseqlength maxpositionembeddings "
        "contextlength context ctx blocksize blocklength",
    "train.clip":
        "gradclip gradientclip maxgradnorm maxnorm clipgrad clipgradnorm gradientclipval gradientclipping",
    "train.activation_checkpointing":
        "gradientcheckpointing recompute recomputeactivations recomputegranularity checkpointactivations "
        "activationcheckpoint",
    "run.steps":
        "epochs epoch numepochs numtrainepochs maxepochs maxsteps trainsteps trainingsteps numsteps "
        "iterations iters trainiters maxiters",
    "run.nproc": "gpus numgpus ngpus ngpu devices numdevices nprocpernode worldsize numprocesses",
    "run.dir": "outputdir outdir savedir logdir output save checkpointdir ckptdir",
    "run.name": "experimentname expname runname resume resumefromcheckpoint",
    "run.seed data.seed": "randomseed",
    "run.dtype": "precision mixedprecision torchdtype bf16 fp16 fp32 amp half params_dtype",
    "run.device": "accelerator",
    "model.dim": "hiddensize hiddendim dmodel nembd embeddim embeddingdim width",
    "model.num_layers": "layers nlayer nlayers numhiddenlayers depth",
    "model.num_heads": "heads nhead nheads numattentionheads",
    "model.num_kv_heads": "numkeyvalueheads kvheads numquerygroups nkvheads",
    "model.expert_dim": "intermediatesize moeintermediatesize ffnhiddensize moeffnhiddensize dff ffndim",
    "model.dense_dim": "denseintermediatesize",
    "model.num_experts": "experts nexperts numlocalexperts nroutedexperts moenumexperts numroutedexperts",
    "model.top_k": "topk k numexpertspertok numexpertspertoken moetopk moeroutertopk expertspertoken",
    "model.shared_dim": "sharedexpertintermediatesize moesharedexpertintermediatesize",
    "model.num_shared_experts": "sharedexperts nsharedexperts moesharedexperts",
    "model.first_dense_layers": "firstkdensereplace numdenselayers",
    "model.moe_layers": "decodersparsestep moelayerfreq moelayerinterval moefreq mlponlylayers",
    "model.init_std": "initializerrange initmethodstd",
    "model.rope_theta": "rotarybase ropebase",
    "model.partial_rotary_factor": "rotarypct rotarypercent",
    "model.rope_interleaved": "ropeinterleave rotaryinterleaved",
    "model.rope_scaling": "ropeparameters ropescalingtype ropescalingfactor",
    "model.qk_norm": "useqknorm qknorm qklayernorm",
    "model.attention_bias": "qkvbias addqkvbias attnbias",
    "model.attention_sinks": "sinks softmaxtype",
    "model.sliding_window": "windowsize slidingwindowsize",
    "model.sliding_layers": "layertypes windowattnskipfreq",
    "model.attention_multiplier": "softmaxscale attnscale",
    "model.norm": "normalization normtype",
    "model.head_bias": "lmheadbias",
    "model.mtp_layers": "numnextnpredictlayers nextnpredictlayers mtpnumlayers nummtplayers mtpdepth",
    "model.mtp_weight": "mtplossscalingfactor mtplossweight mtplosscoef mtplambda",
    "model.norm_eps": "rmsnormeps layernormeps layernormepsilon",
    "model.tie_embeddings": "tiewordembeddings tieweights",
    "optim.lr": "learningrate maxlr peaklr baselr",
    "optim.min_lr_ratio": "minlr lrmin endlr",
    "optim.warmup":
        "warmupsteps numwarmupsteps warmupratio lrwarmupsteps lrwarmupiters warmupiters warmupfraction",
    "optim.schedule": "lrscheduler lrschedulertype scheduler lrschedule lrdecaystyle",
    "optim.decay": "decaysteps lrdecaysteps lrdecayiters decayratio",
    "optim.weight_decay": "wd",
    "optim.betas": "beta1 beta2 adambeta1 adambeta2",
    "optim.eps": "adamepsilon epsilon adameps",
    "optim=adamw optim=muon": "optimizer optimizertype",
    "balance.weight":
        "auxlosscoef auxlosscoeff routerauxlosscoef moeauxlosscoeff auxlossweight loadbalancingloss "
        "balanceloss auxloss",
    "loss=[z] loss.z.weight": "zloss routerzlosscoef moezlosscoeff zlossweight zlosscoef",
    "capacity=position capacity.factor":
        "capacityfactor moecapacityfactor moeexpertcapacityfactor expertcapacity",
    "parallel=ep parallel.ep":
        "expertparallel expertparallelsize epsize epdegree expertparalleldegree expertmodelparallelsize",
    "parallel=fsdp parallel.shard": "fsdpsize shardsize dpshard dataparallelsharddegree zero",
    "engine=deepspeed engine.zero_stage": "deepspeed stage zerostage",
    "data.path": "dataset datasetname trainfile traindata datadir datapath corpus dataprefix text trainfiles",
    "data.tokenizer": "tokenizerpath tokenizername tokenizermodel tokenizertype vocabfile vocab",
    "checkpoint.interval":
        "savesteps saveinterval saveevery checkpointinterval ckptinterval checkpointevery saveevery savefreq",
    "checkpoint.keep": "savetotallimit keeplast maxcheckpoints keeplatestk",
    "eval.interval": "evalsteps evalinterval evalevery valcheckinterval validationinterval",
    "log.interval": "loggingsteps loginterval logevery logfreq logeverynsteps printevery",
    "log.timeline": "profile profiler trace profiling enableprofiling",
    "log.wandb": "usewandb reportto tracker",
    "log.wandb_project": "project wandbprojectname",
    "generate.tokens": "maxnewtokens maxtokens numtokens newtokens",
    "generate.temperature": "temp",
    "generate.top_p": "nucleus",
    "generate.prompt": "input query",
}
_BY_NAME = {name.replace("_", ""): ours.split() for ours, names in _KEYS.items() for name in names.split()}

# Values of a key or options of a group: as typed -> what to type.
_VALUES = {
    "schedule=wsd": ["optim.schedule=wsd"], "schedule=cosine": ["optim.schedule=cosine"],
    "schedule=linear": ["optim.schedule=wsd"],
    "optim=adam": ["optim=adamw"], "optim=sgd": ["optim=adamw"], "optim.name=adam": ["optim=adamw"],
    "optim.schedule=linear": ["optim.schedule=wsd"],
    "optim.schedule=constant": ["optim.schedule=wsd optim.decay=0"],
    "parallel=dp": ["parallel=ddp"], "parallel=zero": ["parallel=fsdp"], "parallel=zero3": ["parallel=fsdp"],
    "parallel=none": ["parallel=single"], "parallel=moe": ["parallel=ep"],
    "run.dtype=bf16": ["run.dtype=bfloat16"], "run.dtype=fp32": ["run.dtype=float32"],
    "run.dtype=float": ["run.dtype=float32"], "run.dtype=fp64": ["run.dtype=float64"],
    "run.dtype=double": ["run.dtype=float64"], "run.dtype=fp16": ["run.dtype=bfloat16"],
    "run.dtype=float16": ["run.dtype=bfloat16"], "run.dtype=half": ["run.dtype=bfloat16"],
    "run.device=gpu": ["run.device=cuda"],
    "router=softmax": ["router=topk"], "router=switch": ["router=topk"],
    "router=deepseek": ["router=sigmoid"], "capacity=dropless": ["capacity=none"],
    "balance=batch": ["balance=global"], "balance=off": ["balance=none"],
    "data=fake": ["data=synthetic"], "data=random": ["data=synthetic"], "data=dummy": ["data=synthetic"],
    "logging=tensorboard": ["logging=wandb"], "log.wandb=true": ["log.wandb=online"],
    "log.wandb=on": ["log.wandb=online"], "log.wandb=disabled": ["log.wandb=off"],
    "train.activation_checkpointing=true": ["train.activation_checkpointing=full"],
}

# An empty answer: other projects have such a verb, and moetrain has none.
_VERBS = {
    "evaluate": ["eval"], "test": ["eval"], "validate": ["eval"],
    "sample": ["generate"], "infer": ["generate"], "inference": ["generate"], "predict": ["generate"],
    "chat": ["generate"],
    "prepare": ["data prepare"], "preprocess": ["data prepare"], "tokenize": ["data prepare"],
    "plot": ["report"], "draw": ["report"], "show": ["inspect"], "info": ["inspect"],
    "verify": ["checkpoint verify"], "resize": ["checkpoint resize"], "prune": ["checkpoint resize"],
    "expand": ["checkpoint resize"],
    "fit": ["train"], "run": ["train"], "resume": ["train"], "pretrain": ["train"],
    "sweep": ["train --multirun"], "submit": ["slurm"], "sbatch": ["slurm"],
    "convert": ["export", "import"], "save_pretrained": ["export"], "from_pretrained": ["import"],
    "load": ["import"], "finetune": [], "trace": [],
}


def keys_meant(path: str) -> Sequence[str]:
    """Look up the keys and overrides behind a foreign name of a key, whatever section was typed."""
    return _BY_NAME.get(path.rpartition(".")[2].lower().replace("_", "").replace("-", ""), ())


def values_meant(key: str, value: str) -> Sequence[str]:
    """Look up the overrides behind a foreign value of a key, or a foreign option of a group."""
    # Ranks count the GPUs themselves, so a single one is chosen by what the process sees.
    if key == "run.device" and (number := re.fullmatch(r"(?:cuda|gpu):(\d+)", value.lower())):
        return [f"CUDA_VISIBLE_DEVICES={number[1]} before the same command with run.device=cuda"]
    return _VALUES.get(f"{key}={value.lower()}", ())


def verbs_meant(word: str) -> Sequence[str] | None:
    """Look up the verbs behind a foreign verb; None where the table does not have it."""
    return _VERBS.get(word.lower())
