"""Every option, its type, default and meaning: one tree of models that flags, YAML files and the code share.

Names and defaults are OpenRLHF's (`openrlhf.cli.train_ppo_ray`) wherever it has the option; ours are under
`algo.distill`, `teacher`, `cluster` and a few in `data`, `eval` and `train`. A default lives here and nowhere else.
This module imports neither torch nor ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from annotated_types import Predicate
from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Interval = Annotated[int, Field(ge=-1), Predicate(bool)]  # in steps; -1, or more than 0


class Section(BaseModel):
    """A group of options. Unknown keys, NaN and infinity are errors; a configuration never changes once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BellmanOptions(Section):
    """Options of the Bellman Distill objective (Eq. 17 and its documented variants). Defaults are preset `robust`."""

    objective: Literal["eq17", "released"] = Field(
        "eq17", description="the published equation, or the terms that the authors' published code computes"
    )
    top_p: Probability = Field(0.95, description="mass p of the candidate sets (Def. 1); 1 means no mask")
    include_eos: bool = Field(True, description="stop tokens belong to every candidate set")
    alpha: Positive = Field(83.0, description="chi-squared coefficient: the temporal-difference weight is 1/(4 alpha)")
    gamma: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.99, description="discount factor")
    tau: Positive = Field(1.0, description="temperature that divides the student's logits to make Q")
    q_shift: Literal["none", "constant", "max", "max_detached", "topp_max", "logsumexp"] = Field(
        "constant", description="shift b of Q = z / tau - b"
    )
    q_min: float | None = Field(None, description="lower clip of Q, nats; none leaves Q unclipped")
    linear_term: Literal["sampled", "expected"] = Field(
        "expected", description="sampled action (Eq. 17), or its expectation under the projected teacher"
    )
    out_of_set: Literal["drop", "clip", "zero"] = Field(
        "drop", description="sampled action outside its set: drop the term, use Q_min, or Q = 0"
    )
    regulariser: Literal["chi2", "none", "kl_fix", "hellinger", "js"] = Field(
        "chi2", description="reward regulariser phi of the IQ-Learn family"
    )
    terminal: Literal["zero", "drop_chi", "absorbing"] = Field(
        "zero", description="value after a stop token: 0, no temporal-difference term, or an absorbing state"
    )
    truncated: Literal["bootstrap", "drop"] = Field(
        "bootstrap", description="next value at the end of a cut response: value of the next state, or no term"
    )
    next_value_gradient: Literal["full", "stop", "target"] = Field(
        "full",
        description="gradient through the next state's value; target: no gradient, and a slow copy of the student",
    )
    target_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.995, description="decay a step of the moving average that is the slow copy (next_value_gradient target)"
    )
    td_warmup_steps: Count = Field(0, description="steps over which the regulariser's weight grows linearly from 0")
    reduction: Literal["token", "sequence"] = Field("token", description="mean over response tokens, or per-row means")
    tail_coef: NonNegative = Field(1.0, description="coefficient of the binary KL of the mass inside the sets")
    tail_estimator: Literal["exact", "sampled"] = Field(
        "exact", description="mass outside the sets: over the vocabulary, or estimated from shared random tokens"
    )
    tail_samples: PositiveInt = Field(4096, description="random tokens of a micro-batch, for tail_estimator sampled")
    tail_tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="states whose mass inside is nearer to the teacher's than this get no gradient of the tail"
    )
    student_target: Literal["none", "forward", "reverse"] = Field(
        "forward",
        description="linear term of the student's own responses: none, the expected one, or reverse KL between the "
        "projected policies",
    )
    student_tail: bool = Field(True, description="the student's own responses have the tail term too")
    student_td: bool = Field(True, description="the student's own responses have the regulariser too (LS-IQ's mixture)")
    student_out_of_set: Literal["drop", "penalise"] = Field(
        "drop",
        description="regulariser of an action outside its set in the student's own responses: none, or pull its reward "
        "to -2 alpha",
    )


PRESETS: dict[str, dict[str, Any]] = {
    "robust": {},
    "paper": {
        "top_p": 0.8,
        "include_eos": False,
        "alpha": 0.1,
        "q_shift": "max",
        "q_min": -10.0,
        "linear_term": "sampled",
        "tail_coef": 0.0,
        "student_target": "none",
    },
}
PRESETS["released"] = {**PRESETS["paper"], "objective": "released", "reduction": "sequence"}


class OnlineOptions(Section):
    """Where an online run's rows come from, and how far making and learning may be apart."""

    mode: Literal["offline", "online", "offline_then_online"] = Field(
        "offline",
        description="offline: all rows are there before training; online: rows are made while the student trains; "
        "offline_then_online: the first algo.distill.offline_steps from teacher.store_path",
    )
    rollout: Literal["teacher", "student", "mixed"] | None = Field(
        None,
        description="online: whose responses; mixed: the student's for algo.distill.student_fraction of rows; none: "
        "mixed, the student's where the algorithm needs them, the teacher's where it cannot use the student's",
    )
    student_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="online, mixed: share of rows that the student samples (beta)"
    )
    student_warmup_steps: Count = Field(
        0, description="online, mixed: optimizer steps over which the student's share grows linearly from 0"
    )
    teacher_mix: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="online: share of the tokens of the student's responses that the teacher samples (MiniLLM)"
    )
    max_staleness: Count = Field(
        1, description="online: optimizer steps that the sampling student may be behind; 0 is strictly on-policy"
    )
    max_ahead: PositiveInt = Field(4, description="online: optimizer steps that rows may be made ahead of training")
    stale_rows: Literal["wait", "discard"] = Field(
        "wait",
        description="online: begin no row that could become too stale, or begin at once and discard those that did",
    )
    in_flight: Literal["wait", "keep", "abort"] = Field(
        "wait",
        description="online: responses in the making when new weights arrive are finished first, go on with the new "
        "weights, or begin anew",
    )
    sync_steps: PositiveInt = Field(1, description="online: optimizer steps between two updates of the engines")
    offline_steps: PositiveInt | None = Field(
        None, description="offline_then_online: optimizer steps before the online ones; none: one pass over the rows"
    )


class DivergenceOptions(Section):
    """Options of the algorithms that match the teacher's distribution at each state: kd, gkd, rkl, minillm."""

    responses: Literal["teacher", "gold"] = Field(
        "teacher",
        description="kd: at whose states the student learns: of the teacher's responses, or of the data set's own",
    )
    kd_support: Literal["sets", "full"] = Field(
        "sets",
        description="kd: what the KL is over: the recorded candidates and one bucket for all other tokens, or the "
        "whole vocabulary, by a teacher in each student rank",
    )

    jsd_beta: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="gkd: coefficient of the Jensen-Shannon divergence; 0 is forward KL, 1 reverse KL"
    )
    divergence_support: Literal["bucket", "set"] = Field(
        "bucket",
        description="gkd, rkl: what the divergence is over: the candidates and one bucket for all other tokens, or "
        "both policies projected on the candidates",
    )
    importance: Literal["token", "sequence"] = Field(
        "token",
        description="minillm: importance weight of a token: its own ratio of policy and behaviour, or the product of "
        "the ratios up to it",
    )
    importance_clip: Positive = Field(
        0.2, description="minillm: clip of PPO's ratio; other importance ratios count up to 1 + this"
    )
    length_normalisation: bool = Field(True, description="minillm: mean in the place of the sum of later rewards")


class DistillConfig(BellmanOptions, DivergenceOptions, OnlineOptions):
    """`--algo.distill.*`: which algorithm, where rollouts come from, and the objective's options."""

    name: str = Field("bd", description="algorithm: a registered name (`openrlhf-bd list`) or package.module:Class")
    preset: Literal["robust", "paper", "released"] = Field(
        "robust",
        description="values of the objective's options that are not given: robust, the published method, or what its "
        "published code computes",
    )
    pretrain_coef: NonNegative = Field(
        1.0, description="coefficient of the language-model loss on --data.pretrain_dataset (J_PT)"
    )
    kd_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="share of J_PT that is KL(teacher || student) over the vocabulary; above 0 needs the teacher"
    )
    z_loss_coef: NonNegative = Field(
        0.0, description="coefficient of the squared log-sum-exp of the logits, in cross-entropy losses"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_below_given_values(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**PRESETS.get(values.get("preset", "robust"), {}), **values}
        return values


# What an algorithm's loss may read; the other options of DistillConfig concern the run, whatever the algorithm.
OBJECTIVE_OPTIONS = (*BellmanOptions.model_fields, *DivergenceOptions.model_fields)


def changed_objective(options: DistillConfig) -> dict[str, Any]:
    """The objective's options that differ from their preset, by name: those that somebody must have asked for.

    The values decide, not who wrote them: a configuration that was printed in full and is read back gives every option.
    """
    preset = DistillConfig(preset=options.preset)
    found, expected = options.model_dump(), preset.model_dump()
    return {name: found[name] for name in OBJECTIVE_OPTIONS if found[name] != expected[name]}


class AlgoConfig(Section):
    distill: DistillConfig = Field(default_factory=DistillConfig)


class AdamConfig(Section):
    lr: Positive = Field(1e-6, description="learning rate")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas")
    eps: Positive = Field(1e-8, description="AdamW epsilon")
    weight_decay: NonNegative = Field(0.0, description="AdamW weight decay; biases and norms are exempt by name")


class MuonConfig(Section):
    lr: Positive = Field(0.02, description="learning rate of the hidden matrices; actor.adam.lr drives all others")
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.95, description="Muon momentum")


class ActorConfig(Section):
    """`--actor.*`: the student."""

    model_name_or_path: str | None = Field(None, description="student: HF model name or path")
    num_nodes: PositiveInt = Field(1, description="nodes of the student")
    num_gpus_per_node: PositiveInt = Field(8, description="student ranks a node, one GPU each")
    gradient_checkpointing_enable: bool = Field(False, description="recompute activations in the backward pass")
    gradient_checkpointing_reentrant: bool = Field(False, description="the reentrant form of it")
    optim: Literal["adam", "muon"] = Field(
        "adam", description="optimizer; muon: for the hidden matrices, AdamW for embeddings, biases and norms"
    )
    adam: AdamConfig = Field(default_factory=AdamConfig)
    muon: MuonConfig = Field(default_factory=MuonConfig)
    lr_scheduler: str = Field("cosine_with_min_lr", description="a schedule of transformers.get_scheduler")
    lr_warmup_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.03, description="warm-up share of all steps")
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(0.1, description="final share of the learning rate")
    max_norm: NonNegative = Field(1.0, description="gradient clipping norm; 0 turns it off")


class TeacherConfig(Section):
    """`--teacher.*`: the teacher and its vLLM engines."""

    model_name_or_path: str | None = Field(None, description="teacher: HF model name or path")
    routes: str | None = Field(
        None, description="teachers of some records, value=model comma-separated; others: teacher.model_name_or_path"
    )
    route_key: str | None = Field(None, description="key in a record of the value by which teacher.routes chooses")
    prompt_wrapper: Literal["none", "paper"] = Field(
        "none", description="paper: the teacher sees Fig. 3's wrapper; none: teacher.input_template or what data says"
    )
    input_template: str | None = Field(
        None, description="the teacher's own template with one {} around the instruction; none: what data says"
    )
    apply_chat_template: bool = Field(False, description="the teacher sees the chat template of its own tokenizer")
    system_prompt: str | None = Field(None, description="system message that the teacher alone sees in a chat template")
    privileged_key: str | None = Field(
        None, description="key in a record of a text that the teacher alone sees, after the instruction"
    )
    privileged_template: str = Field("{}", description="template with one {} around the text of teacher.privileged_key")
    max_len: PositiveInt | None = Field(
        None, description="longest teacher's prompt and response together, tokens; none: data.max_len"
    )
    num_engines: PositiveInt = Field(1, description="vLLM engines that generate")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs of each engine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights of the teacher; auto: the checkpoint's type on GPUs, float32 on CPUs"
    )
    max_num_seqs: PositiveInt = Field(256, description="sequences an engine decodes at once")
    gpu_memory_utilization: Probability = Field(0.9, description="share of GPU memory an engine may take")
    enforce_eager: bool = Field(False, description="no CUDA graphs")
    enable_prefix_caching: bool = Field(True, description="share the prompt's cache among its samples")
    store_path: str | None = Field(
        None,
        description="folder of the teacher's data, or its URL (s3://bucket/folder: any that fsspec reaches); "
        "none: <ckpt.output_dir>/teacher_data; reused where it fits",
    )
    api_base: str | None = Field(
        None,
        description="URL of an OpenAI-compatible server that hosts the teacher, http://HOST:PORT/v1, in the place of "
        "engines; its key: the environment variable OPENAI_API_KEY",
    )
    api_model: str | None = Field(None, description="name of the model on that server; none: the only one there")
    api_top_logprobs: PositiveInt = Field(
        20, description="K: candidate sets are cut at the K likeliest tokens, which is what a server tells of a state"
    )
    api_concurrency: PositiveInt = Field(64, description="requests that each of teacher.num_engines has on the way")
    api_timeout_s: Positive = Field(300.0, description="longest wait for one answer of the server, seconds")
    api_max_retries: Count = Field(
        8, description="further tries, with growing pauses, of a request that the server did not answer or put off"
    )
    record_logprobs: bool = Field(True, description="record the candidates' log-probabilities too")
    rows_per_shard: PositiveInt = Field(2048, description="rows of one sealed shard")
    max_engine_restarts: Annotated[int, Field(ge=0)] = Field(
        16, description="engines replaced after they died, failed or hung, in all"
    )
    max_quarantined_rows: Annotated[int, Field(ge=0)] = Field(
        16, description="rows of a teacher left out, by name, because each ended two engines by itself"
    )


class VllmConfig(Section):
    """`--vllm.*`: engines that host the student (validation and evaluation)."""

    num_engines: PositiveInt | None = Field(None, description="engines that sample from the student; none: 1")
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs of each engine")
    gpu_memory_utilization: Probability = Field(0.95, description="share of GPU memory an engine may take")
    enforce_eager: bool = Field(False, description="no CUDA graphs")
    enable_prefix_caching: bool = Field(False, description="share prompts' caches")


class RolloutConfig(Section):
    """`--rollout.*`: how the teacher samples."""

    n_samples_per_prompt: PositiveInt = Field(1, description="responses a prompt")
    temperature: Positive = Field(1.0, description="sampling temperature")
    top_p: Probability = Field(1.0, description="nucleus of the sampler (not of the candidate sets)")
    max_new_tokens: PositiveInt | None = Field(None, description="longest response; none: what data.max_len leaves")


class DataConfig(Section):
    """`--data.*`: prompts, references and pre-training text."""

    prompt_dataset: str | None = Field(None, description="file, folder or hub data sets of prompts, comma-separated")
    prompt_probs: str | None = Field(None, description="sampling probabilities of the data sets, comma-separated")
    prompt_split: str = Field("train", description="split of the prompt data sets")
    input_key: str = Field("input", description="key of the instruction in a record")
    context_key: str | None = Field(None, description="key of the optional further input in a record")
    label_key: str | None = Field(None, description="key of the reference response in a record")
    prompt_wrapper: Literal["none", "paper"] = Field(
        "none", description="paper: the instruction wrapper of Fig. 3; none: --data.input_template or the text as it is"
    )
    input_template: str | None = Field(None, description="template with one {} around the instruction")
    apply_chat_template: bool = Field(False, description="use the tokenizer's chat template")
    max_len: PositiveInt = Field(2048, description="longest prompt and response together, tokens")
    max_prompt_len: PositiveInt | None = Field(None, description="longest prompt, tokens; none: data.max_len - 1")
    overlong_prompts: Literal["drop", "keep"] = Field(
        "drop", description="prompts over the limit: drop, or keep their last tokens; counted and reported"
    )
    max_samples: PositiveInt = Field(int(1e8), description="at most so many records of each data set")
    disable_fast_tokenizer: bool = Field(False, description="use the slow tokenizer")
    pretrain_dataset: str | None = Field(None, description="pre-training text (J_PT): file, folder or hub data set")
    pretrain_split: str = Field("train", description="split of the pre-training data set")
    pretrain_key: str = Field("text", description="key of the text in a pre-training record")


class TrainConfig(Section):
    """`--train.*`: the training loop."""

    batch_size: PositiveInt = Field(128, description="rows of one optimizer step, over all ranks")
    pretrain_batch_size: PositiveInt | None = Field(
        None, description="pre-training blocks a step; none: as train.batch_size"
    )
    micro_batch_size: PositiveInt = Field(1, description="rows of a micro-batch where dynamic batches are off")
    dynamic_batch_enable: bool = Field(False, description="fill micro-batches up to train.max_tokens_per_gpu")
    max_tokens_per_gpu: PositiveInt = Field(16192, description="tokens of a dynamic micro-batch")
    max_epochs: PositiveInt = Field(1, description="passes over the rows; online: over the prompts, with new rows")
    row_order: Literal["shuffled", "recorded"] = Field(
        "shuffled", description="offline: shuffled by train.seed, or the steps of the online run that made the rows"
    )
    max_steps: PositiveInt | None = Field(None, description="stop after so many optimizer steps, whatever the epochs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="seed of order, sampling and initialisation")
    colocate_all: bool = Field(
        False, description="online: the student's engines share its ranks' GPUs, and sleep while these train"
    )
    full_determinism_enable: bool = Field(False, description="deterministic kernels")
    enable_ema: bool = Field(
        False, description="validate and save a running average of the weights instead of the weights themselves"
    )
    ema_beta: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.992, description="share of the old average that stays at each step"
    )


class LoraConfig(Section):
    rank: Annotated[int, Field(ge=0)] = Field(0, description="rank of the adapters; 0 trains all weights")
    alpha: PositiveInt = Field(16, description="adapters count for alpha / rank")
    target_modules: list[str] = Field(
        ["all-linear"], description="names of the layers that get adapters; all-linear: all but the output head"
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="dropout before each adapter")


class DeepspeedConfig(Section):
    """`--ds.*`: the strategy of the student's ranks."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(2, description="DeepSpeed ZeRO stage")
    param_dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="type of the student's parameters")
    attn_implementation: str = Field(
        "auto", description="attention; auto: flash_attention_2 where flash-attn is installed, else sdpa"
    )
    use_liger_kernel: bool = Field(
        False, description="Liger's kernels for norms, rotary positions and feed-forward layers (CUDA)"
    )
    lora: LoraConfig = Field(default_factory=LoraConfig)
    packing_samples: bool = Field(False, description="pack the rows of a micro-batch into one sequence")
    adam_offload: bool = Field(False, description="optimizer states in host memory (no effect on CPUs)")
    zpg: PositiveInt = Field(1, description="ZeRO++ partition size")
    overlap_comm: bool = Field(False, description="overlap communication with the backward pass")
    grad_accum_dtype: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="type in which gradients accumulate"
    )
    use_universal_ckpt: bool = Field(False, description="load DeepSpeed universal checkpoints")


class CkptConfig(Section):
    """`--ckpt.*`: output and checkpoints."""

    output_dir: str = Field("./ckpt", description="folder of the run: student, metrics, report")
    path: str | None = Field(None, description="folder of the checkpoints; none: <ckpt.output_dir>/checkpoints")
    save_steps: Interval = Field(
        -1, description="checkpoint every so many steps; -1: none, a killed training starts anew"
    )
    save_hf: bool = Field(False, description="also save each checkpoint as a Hugging Face model")
    disable_ds: bool = Field(False, description="no DeepSpeed checkpoints; ckpt.save_hf still saves models")
    max_num: PositiveInt = Field(3, description="checkpoints kept")
    max_mem: Positive = Field(float("inf"), allow_inf_nan=True, description="GB of checkpoints kept")
    load_enable: bool = Field(False, description="start from checkpoints of another run in ckpt.path")
    best_metric_key: str = Field(
        "",
        description="validation measure that selects the student: loss (of references, lower is better; needs no "
        "engine), rouge_l, accuracy, ...; empty: rouge_l",
    )


class EvalConfig(Section):
    """`--eval.*`: validation while training, and the final evaluation."""

    dataset: str | None = Field(None, description="validation data set, for selection")
    split: str = Field("train", description="split of the validation and test data sets")
    steps: Interval = Field(-1, description="validate every so many steps; -1: once an epoch")
    max_samples: PositiveInt | None = Field(None, description="at most so many validation records")
    test_datasets: str | None = Field(
        None,
        description="name=path of the final evaluation, comma-separated; keys of one set's records follow its path: "
        "name=path:input_key=question:label_key=answer",
    )
    seeds: list[int] = Field([10, 20, 30, 40, 50], description="sampling seeds of the final evaluation")
    temperature: NonNegative = Field(1.0, description="sampling temperature")
    top_p: Probability = Field(1.0, description="nucleus of the sampler in validation")
    test_top_p: list[float] = Field([1.0, 0.8], description="nuclei of the sampler in the final evaluation")
    max_new_tokens: PositiveInt | None = Field(None, description="longest response; none: what data.max_len leaves")
    missing_references: Literal["error", "skip"] = Field(
        "error", description="records without a reference: an error, or answered and left out of Rouge-L, and counted"
    )
    checker: str | None = Field(None, description="package.module:function(record, response) -> bool, exact accuracy")
    teacher_nll: bool = Field(False, description="also score the samples by the teacher")
    exposure: bool = Field(
        False,
        description="also measure how far student and teacher are apart at the student's own states and at the "
        "teacher's (final evaluation, samples at temperature 1 without a nucleus)",
    )
    exposure_top_p: Probability = Field(0.8, description="mass p of the teacher's sets in these measures")
    num_examples: Annotated[int, Field(ge=0)] = Field(8, description="responses shown in the report")


class WandbConfig(Section):
    key: str | None = Field(None, description="Weights & Biases key; better in WANDB_API_KEY")
    org: str | None = Field(None, description="entity")
    group: str | None = Field(None, description="group")
    project: str = Field("openrlhf_bd", description="project")
    run_name: str | None = Field(None, description="run name; none: name of the output folder")


class LoggerConfig(Section):
    """`--logger.*`: metrics."""

    logging_steps: PositiveInt = Field(1, description="write metrics every so many steps")
    diagnostics_steps: PositiveInt = Field(
        10, description="compute metrics that read all logits at the first step and every so many"
    )
    peak_tflops: Positive | None = Field(
        None, description="peak TFLOP/s of one rank's device, for mfu; none: known by its name, or measured"
    )
    cost_per_gpu_hour: Positive | None = Field(
        None, description="price of a GPU for an hour, any currency; the report then shows what each stage cost"
    )
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    tensorboard_dir: str | None = Field(None, description="TensorBoard folder; none: <ckpt.output_dir>/tensorboard")


class ClusterConfig(Section):
    """`--cluster.*`: Ray, and how long to wait for what."""

    start_timeout_s: Positive = Field(900.0, description="longest wait for actors to start and load models, seconds")
    step_timeout_s: Positive = Field(1800.0, description="longest wait for one training step, seconds")
    generate_timeout_s: Positive = Field(3600.0, description="longest wait for one batch of responses, seconds")
    sync_timeout_s: Positive = Field(300.0, description="longest wait for one update of the engines' weights, seconds")
    heartbeat_timeout_s: Positive = Field(
        120.0, description="longest silence of an engine that makes rows while the student trains, seconds"
    )


class Config(Section):
    """The whole configuration of a job."""

    algo: AlgoConfig = Field(default_factory=AlgoConfig)
    actor: ActorConfig = Field(default_factory=ActorConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    vllm: VllmConfig = Field(default_factory=VllmConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    ds: DeepspeedConfig = Field(default_factory=DeepspeedConfig)
    ckpt: CkptConfig = Field(default_factory=CkptConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    logger: LoggerConfig = Field(default_factory=LoggerConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    trust_remote_code: bool = Field(False, description="run Python code that a model folder brings")


class JudgeOptions(Section):
    """A judge that compares answers, and how it is asked: `openrlhf-bd judge`, and stages of kind judge."""

    model: str = Field("gpt-4o-mini", description="name of the judge at its server; none is given with serve")
    api_base: str = Field(
        "https://api.openai.com/v1",
        description="URL of an OpenAI-compatible server; its key: the environment variable OPENAI_API_KEY",
    )
    serve: str | None = Field(
        None, description="folder or hub name of a judge that is hosted here while it judges; none: by api_base"
    )
    serve_gpus: PositiveInt = Field(1, description="GPUs that share the served judge (tensor parallel)")
    serve_timeout_s: Positive = Field(900.0, description="longest wait for the served judge to load, seconds")
    test_set: str = Field("dolly", description="test set whose responses are compared")
    seed: int = Field(10, description="sampling seed of these responses")
    top_p: Probability = Field(1.0, description="nucleus with which these responses were sampled")
    constrained: bool = Field(
        False, description="the server can only answer A, B or Tie (structured_outputs of a vLLM server)"
    )
    concurrency: PositiveInt = Field(16, description="requests on the way at once")
    timeout_s: Positive = Field(60.0, description="longest wait for one answer of the server, seconds")
    max_retries: Count = Field(
        8, description="further tries, with growing pauses, of a request that the server did not answer or put off"
    )
    max_asks: PositiveInt = Field(
        3, description="times that a judge is asked until its answer is A, B or Tie; then the comparison is not judged"
    )
    max_requests: PositiveInt | None = Field(None, description="answers that this call may ask for; none: no limit")
    max_tokens: PositiveInt | None = Field(
        None, description="prompt and answer tokens after which this call asks no more; none: no limit"
    )

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        for name in ("api_base", "model"):
            if self.serve is not None and name in self.model_fields_set:
                raise ValueError(f"serve and {name} exclude each other; leave one out, or give serve as none")
        return self


class RetentionOptions(Section):
    """Which standard benchmarks, and how: `openrlhf-bd retention`."""

    tasks: str = Field(
        "lambada_openai,hellaswag,piqa,winogrande,arc_easy",
        description="tasks or groups of lm-evaluation-harness, comma-separated",
    )
    include_path: str | None = Field(None, description="folder of further tasks, YAML files of the harness's form")
    limit: PositiveInt | None = Field(None, description="at most so many documents a task; none: all")
    num_fewshot: Count | None = Field(None, description="examples in each prompt; none: what the task says")
    batch_size: PositiveInt = Field(8, description="sequences at once")
    device: str = Field("auto", description="cuda, cuda:1, cpu; auto: the first GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights of the model; auto: the checkpoint's type on GPUs, float32 on CPUs"
    )
