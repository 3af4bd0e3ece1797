"""An evaluation session: protocol, prompts, networks and reference, loaded once for all points of a curve."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from d2g.core.distributed import process_group
from d2g.core.errors import SettingError, UserError
from d2g.core.json_files import read_json_object
from d2g.core.logs import log_once, logger
from d2g.core.progress import Progress, quiet
from d2g.core.shuffle import permuted
from d2g.core.tracking.run_directory import sole_owner
from d2g.data.pictures import png_text
from d2g.data.prompt_files import prompt_cells, prompt_text
from d2g.diffusion import pretrained
from d2g.diffusion.teacher_sampler import PRIOR_STEPS, SolverSettings, load_sampler
from distill.student_files import guiding_clip, pairs_guidance, student_folder, teacher_prior
from eval.evaluation import Evaluation, evaluate, image_count
from eval.floor import Floor, real_floor
from eval.images.folders import ImageFiles, expect_numbered_order, open_images
from eval.measure.build_reference import open_reference, reference_files
from eval.measure.measure import Measure
from eval.measure.reference import Reference
from eval.measure.required_networks import LOADERS, Networks, load_networks
from eval.measure.rows import MeasureOptions, open_work
from eval.measure.source import ImageSource, image_source
from eval.networks.base import FeatureNet
from eval.networks.registry import default_features
from eval.networks.user_network import is_user_network, load_user_network
from eval.protocols.config import EvalRun
from eval.protocols.data_sources import DATA_SOURCES, EvalDataSource
from eval.protocols.metric import all_metrics, check_metrics, paired_metrics
from eval.protocols.protocol import ANY, PROTOCOLS
from eval.runner.samplers import (
    SamplingRequest,
    pipeline_source,
    student_source,
    teacher_sampler_source,
)
from pairgen.prompts import label_list

_IMAGES_RECORD = ".images.json"
"""The file in a folder of --keep that describes its images."""


class EvalSession:
    """Everything that the points of one evaluation share. Properties are loaded when first used."""

    def __init__(self, config: EvalRun, progress: Progress = quiet) -> None:
        self.config, self.progress = config, progress
        self.device = process_group.init(long_waits=True)
        protocol = config.protocol
        self.protocol = protocol if config.seed is None else replace(protocol, seed=config.seed)
        self.metrics = config.metrics or self.protocol.metrics
        check_metrics(self.metrics)
        config.check_source()
        if config.train is not None:
            open_images(config.train)  # an error at once, not after all images are measured
        if 0 < protocol.images < config.num:
            raise SettingError(
                f"num is {config.num}, but protocol {protocol.name} measures {protocol.images} images; leave "
                f"it out, or change the protocol with --set protocol.images={config.num}"
            )
        self.prompts_note = ""
        """Which prompts are sampled, where there are not as many as images."""
        self.left_out: list[str] = [] if config.metrics else self._leave_out()

    def _leave_out(self) -> list[str]:
        """Remove the protocol's own metrics that lack what the protocol leaves open; one line for each lack.

        Metrics that the user names stay, and raise their own errors. Raises SettingError if none is left.
        """
        config, protocol = self.config, self.protocol
        # What is missing -> what to give, and the metrics that need it.
        lacks: dict[str, list[str]] = {}
        for name in self.metrics:
            metric = all_metrics()[name]
            if "features" in metric.networks and protocol.features == ANY and self.features is None:
                lacks.setdefault("no feature network; give --features inception", []).append(name)
            elif (
                "clip" in metric.networks
                and protocol.clip == ANY
                and not (config.clip or self._teacher_clip())
            ):
                lacks.setdefault("no CLIP; give --clip vit-b-32 or a folder", []).append(name)
            elif metric.needs_reference and protocol.reference == "given" and not self.has_reference:
                lacks.setdefault("no real images; give --reference", []).append(name)
        lines = [f"left out: {', '.join(names)} ({reason})" for reason, names in lacks.items()]
        missing = {name for names in lacks.values() for name in names}
        self.metrics = tuple(name for name in self.metrics if name not in missing)
        if not self.metrics:
            raise SettingError(f"nothing can be measured: {'; '.join(lines)}, or name others with --metrics")
        for line in lines if process_group.rank() == 0 else ():
            logger.info("%s; measured: %s", line, ", ".join(self.metrics))
        return lines

    @contextmanager
    def sole_evaluation(self) -> Iterator[None]:
        """Hold the folders that this evaluation writes. Raises UserError while another one holds one."""
        options = {"--work": self.config.work, "--keep": self.config.keep, "--out": self.config.out}
        with ExitStack() as stack:
            for option, name in options.items():
                if name and not (option == "--out" and name.endswith(".json")):
                    stack.enter_context(sole_owner(Path(name), "evaluates in", option))
            yield

    @property
    def data_source(self) -> EvalDataSource | None:
        """The registered source of the protocol's real images, if it has one."""
        return DATA_SOURCES.get(self.protocol.reference)

    @property
    def has_reference(self) -> bool:
        """Whether there are real images to compare with."""
        return self.data_source is not None or self.config.reference is not None

    @property
    def teacher(self) -> str | None:
        """The teacher whose VAE gives LatentLPIPS its latent space, and which a student is compared with."""
        if self.config.student is not None:
            return self.config.teacher or student_folder(self.config.student)[1]
        return self.config.teacher or (self.data_source.teacher if self.data_source is not None else None)

    @cached_property
    def networks(self) -> Networks:
        """The networks that the metrics need."""
        config = self.config
        self._refuse_unused_networks()
        measures = self._source_measures()
        networks = load_networks(
            self.metrics,
            self.protocol,
            features=self._feature_network() if self.needs_features else None,
            clip=config.clip or self._teacher_clip(),
            weights=config.weight_table(),
            teacher=self.teacher,
            device=self.device,
        )
        return replace(networks, extra={**networks.extra, **measures})

    @property
    def needed_networks(self) -> set[str]:
        """The networks that the metrics need, as `--weights NAME=PATH` names them."""
        return _networks_of(self.metrics)

    @property
    def needs_features(self) -> bool:
        """Whether a metric needs the protocol's features."""
        return "features" in self.needed_networks

    def _refuse_unused_networks(self) -> None:
        """Raise SettingError for a network or its weights, given by hand, that no chosen metric needs.

        The protocol's metrics that lack something else count, too: a line says that they are left out.
        """
        config, metrics = self.config, self.config.metrics or self.protocol.metrics
        needed = _networks_of(metrics)
        options = {"features": config.features and "--features", "clip": config.clip and "--clip"}
        given = {name: option for name, option in options.items() if option}
        given |= {name: f"--weights {name}=PATH" for name in config.weight_table() if name in LOADERS}
        for network, option in given.items():
            if network not in needed:
                raise SettingError(
                    f"{option} has no effect: none of the metrics {', '.join(metrics)} needs that "
                    "network; leave it out, or add a metric that does to --metrics"
                )

    @cached_property
    def features(self) -> str | None:
        """The name of the feature network: the user's, else the protocol's, else `default_features`."""
        config, protocol = self.config, self.protocol
        if config.features is not None or protocol.features != ANY:
            return config.features or protocol.features
        # A weight file belongs to a network that the user must name.
        default = None if "features" in config.weight_table() else default_features()
        if default is not None:
            log_once(f"no --features: {default[0]}, because {default[1]}")
        return None if default is None else default[0]

    def _feature_network(self) -> FeatureNet | str | None:
        """The network of a data source or of the user, else its name.

        Only `config.features`, which comes from the command line, can name a user's own code.
        """
        config, name = self.config, self.features
        if is_user_network(config.features):
            assert config.features is not None
            if "features" in config.weight_table():
                raise SettingError("--weights has no effect: --features names the network itself")
            return load_user_network(config.features, config.features_input, self.device)
        if config.features_input is not None:
            raise SettingError(
                f"--features-input has no effect: {name} prepares its images; give --features FILE too"
            )
        loaders = {key: load for source in DATA_SOURCES.values() for key, load in source.features.items()}
        if name not in loaders:
            return name
        if "features" in config.weight_table():
            raise SettingError(f"--weights has no effect: the features {name} bring their own; leave it out")
        network: FeatureNet = loaders[name]()
        return network

    def _source_measures(self) -> dict[str, Measure]:
        """The measures of the chosen metrics that a data source provides, by the name of their rows.

        Raises SettingError for a metric of another data source than the protocol's.
        """
        measures: dict[str, Measure] = {}
        for name in self.metrics:
            required = all_metrics()[name].data_source
            if not required:
                continue
            # Its rows exist only for images of that data source.
            if self.data_source is None or self.data_source.name != required:
                fitting = [key for key, protocol in PROTOCOLS.items() if protocol.reference == required]
                raise SettingError(
                    f"metric {name!r} is measured on {required} only; take protocol {' or '.join(fitting)}"
                )
            measures |= self.data_source.measures[name](self.protocol.preprocessing)
        return measures

    def _teacher_clip(self) -> str | None:
        """The CLIP in the teacher's folder, where the protocol leaves the CLIP open."""
        if self.protocol.clip != ANY or "clip" not in self.metrics or self.teacher is None:
            return None
        folder = pretrained.resolve(self.teacher) / "clip"
        return str(folder) if folder.is_dir() else None

    @cached_property
    def count(self) -> int:
        """Number of images to measure; 0 where only the measured source decides."""
        default = self.data_source.images if self.data_source is not None else 0
        return self.config.num or self.protocol.images or default

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts to sample, in order; empty where images bring their own prompts."""
        config, rule = self.config, self.protocol.prompts
        if config.prompts is not None:
            return read_list(Path(config.prompts), config.column)
        if rule in DATA_SOURCES:
            return DATA_SOURCES[rule].prompts(self.count)
        if config.reference is not None and rule.startswith("coco"):
            # The prompts of a COCO protocol come with its reference: a statistics file, or COCO's folder.
            path = Path(config.reference)
            if path.suffix == ".safetensors":
                return list(Reference.load(path).prompts)
            return list(reference_files(path, self.protocol)[1])
        return []

    def sampling_request(self, prompts: list[str]) -> SamplingRequest:
        """Build the request for these prompts. Raises SettingError if there are none."""
        if not prompts:
            raise SettingError("--prompts is not set; give the file of captions to draw")
        return SamplingRequest(
            prompts=self._choose(prompts),
            seed=self.protocol.seed,
            device=self.device,
            precision=self.config.precision,
        )

    def _choose(self, prompts: list[str]) -> list[str]:
        """As many prompts as there are images to sample, in their order.

        The protocol's seed chooses them, because files are often sorted by class. COCO's prompts are in
        random order: their first ones are taken.
        """
        if self.count > len(prompts) and self.prompts:  # the classes of a teacher are meant to repeat
            self.prompts_note = (
                f"{len(prompts)} prompts for {self.count} images: they are drawn in turn, each time with new "
                "noise"
            )
            log_once(self.prompts_note)
        if not 0 < self.count < len(prompts):
            return prompts
        if self.config.prompts is None and self.protocol.prompts.startswith("coco"):
            return prompts[: self.count]
        rows = permuted(self.protocol.seed, 0, len(prompts), np.arange(self.count))
        self.prompts_note = (
            f"{self.count} of {len(prompts)} prompts, chosen at random (seed {self.protocol.seed})"
        )
        log_once(self.prompts_note)
        return [prompts[row] for row in np.sort(rows)]

    def source(self, config: EvalRun, checkpoint: Path | None = None) -> ImageSource:
        """The source to measure: files, a student (or a `checkpoint` of its run), a pipeline or a teacher."""
        if config.images is not None:
            files = open_images(config.images, None if config.prompts else config.column)
            return image_source(files, self.prompts if config.prompts else ())
        if config.student is not None:
            return self._student_source(config.student, config, checkpoint)
        if config.pipeline is not None:
            request = self.sampling_request(self.prompts)
            return pipeline_source(config.pipeline, request, steps=config.steps, guidance=config.guidance)
        assert config.teacher is not None
        return self.teacher_source(config.teacher, config)

    def _student_source(self, name: str, config: EvalRun, checkpoint: Path | None) -> ImageSource:
        """A student as a source. Raises SettingError for a guidance scale that has no effect, because the
        student does not take it and nothing is drawn beside it.
        """
        assert self.teacher is not None, "a student has one"
        # A run that trains meanwhile gets newer checkpoints: all processes take the one that rank 0 sees.
        newest = process_group.gather_objects(student_folder(name)[0])[0]
        source = student_source(
            name,
            self.sampling_request(self.prompts or pretrained.default_prompts(self.teacher)),
            teacher=config.teacher,
            folder=checkpoint or newest,
            title=f"{name}, {int(checkpoint.name)} images" if checkpoint else "",
            noise_scale=config.noise_scale,
            psi=config.psi,
            prior=config.prior,
            guidance=_without_zero(config.guidance),
        )
        # What is drawn beside it is the same at every point of a curve.
        of_point = config.guidance != self.config.guidance
        alone = of_point or (self.other is None and not config.latency)
        if config.guidance is not None and "guidance" not in source.facts and alone:
            raise SettingError(
                f"guidance is {config.guidance:g}, but student {name} has its guidance in its weights; leave "
                "it out"
            )
        return source

    def teacher_source(self, name: str, config: EvalRun) -> ImageSource:
        """A teacher as a source. Without prompts, a class-conditional one cycles through all classes, and an
        unconditional one draws from noise alone.
        """
        sampler = load_sampler(name, self._solver_settings(name, config), self.device, config.precision)
        teacher, prompts = sampler.teacher, self.prompts
        if not prompts and teacher.conditioning == "label":
            prompts = list(label_list(teacher.num_labels))
        if not prompts and teacher.conditioning == "none":
            prompts = [""]
        return teacher_sampler_source(sampler, self.sampling_request(prompts))

    def _solver_settings(self, name: str, config: EvalRun) -> SolverSettings:
        """Solver settings of the teacher `name`. Beside students of a cascade, its prior is their prior's
        teacher."""
        prior, guidance = config.prior, config.guidance
        if config.student is not None:
            prior = teacher_prior(name, prior)
            # The student learned the teacher's images at the scale of its pairs.
            if guidance is None and name == self.teacher:
                guidance = pairs_guidance(config.student, name)
        return SolverSettings(
            steps=config.steps,
            guidance=_without_zero(guidance),
            solver=config.solver,
            prior=prior,
            prior_steps=config.prior_steps or PRIOR_STEPS,
            prior_guidance=_without_zero(config.prior_guidance),
        )

    @cached_property
    def other(self) -> ImageSource | None:
        """The second source of paired metrics: the named one, else the student's own teacher."""
        config = self.config
        if not paired_metrics(self.metrics) and config.against is None:
            return None
        name = config.against or (self.teacher if config.student is not None else None)
        if name is None:
            raise SettingError(
                "there is nothing to compare image by image; give --against a teacher or the images it kept"
            )
        if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
            return self._other_images(name)
        return self.teacher_source(name, config)

    def _other_images(self, name: str) -> ImageSource:
        """The images of the folder --against. Raises UserError if they are of other noise than the measured
        ones, as far as their folders record it."""
        files, images = open_images(name), self.config.images
        _expect_no_gap(files)
        if images is None:
            expect_numbered_order(files)
            seed: int | None = self.protocol.seed
        else:
            measured = open_images(images)
            _expect_no_gap(measured)
            seed = _noise_seed(measured)
        other = _noise_seed(files)
        if None not in (seed, other) and seed != other:
            raise UserError(
                f"{name} holds images of seed {other}, and the images to compare with them are of seed "
                f"{seed}; pairs are of one prompt and noise, give --seed {other} or other images"
            )
        return image_source(files)

    @cached_property
    def reference(self) -> Reference | None:
        """The reference statistics, measured now or read from the cache."""
        compared = self.networks.compared
        if not compared:
            return None
        if self.config.reference is None and self.data_source is not None:
            count = self.protocol.reference_images or self.count
            reference: Reference = self.data_source.reference(count, self.protocol, compared, self.progress)
            return reference
        assert self.config.reference is not None
        return open_reference(
            Path(self.config.reference),
            self.protocol,
            compared,
            allow_fewer=self.config.allow_fewer,
            batch_size=self.config.batch_size,
            progress=self.progress,
        )

    @cached_property
    def training(self) -> Reference | None:
        """Statistics of all training pictures (--train); None without them, or where there is no floor."""
        given = self.config.reference is not None and self.protocol.reference == "given"
        if self.config.train is None or not given or not self.networks.compared:
            return None
        return open_reference(
            Path(self.config.train),
            replace(self.protocol, reference_images=0),
            self.networks.compared,
            allow_fewer=True,
            batch_size=self.config.batch_size,
            progress=self.progress,
        )

    def _open_references(self) -> Reference | None:
        """The reference, after the training pictures: a damaged one is an error before an image is drawn."""
        _ = self.training  # a cached property
        return self.reference

    def measure(self, config: EvalRun, checkpoint: Path | None = None) -> tuple[ImageSource, Evaluation]:
        """Evaluate one point: sample, measure, compute the numbers."""
        source, networks = self.source(config, checkpoint), self.networks
        evaluation = evaluate(
            source,
            self.protocol,
            networks,
            metrics=self.metrics,
            reference=self._open_references if self.has_reference else None,
            other=self.other,
            count=self._count(source),
            allow_fewer=config.allow_fewer,
            work=self._measure_options(config, source),
            resamples=config.resamples,
            progress=self.progress,
        )
        result, training = evaluation.result, self.training
        # Real pictures against real pictures, as the distance that nothing needs to go below.
        floor = (
            real_floor(evaluation.reference, training, self.protocol, self.metrics, len(evaluation.rows))
            if process_group.rank() == 0
            else Floor()
        )
        first = _first_note(source, len(evaluation.rows))
        more = (self.prompts_note, first, floor.note, _sides_note(result.counts), self._guidance_note())
        notes = [*result.notes, *self.left_out, *filter(None, more)]
        result = replace(result, notes=notes, floor=dict(floor.numbers))
        return source, replace(evaluation, result=result)

    def _guidance_note(self) -> str:
        """Return a note if the CLIP of the CLIP score guided the student in training; else ""."""
        clip, student = self.networks.clip, self.config.student
        if clip is None or student is None or not clip.text_sha256:
            return ""
        if guiding_clip(student) != clip.text_sha256:
            return ""
        log_once(note := f"{clip.name} guided this student in training: its CLIP score is inflated")
        return note

    def _count(self, source: ImageSource) -> int:
        """Images to measure; a sampler without a set number draws one image per prompt."""
        return self.count or (len(self.prompts) if source.count is None else 0)

    def _measure_options(self, config: EvalRun, source: ImageSource) -> MeasureOptions:
        """Batch size and folders; opens the folders, which refuse parts and images of another evaluation."""
        folder = Path(config.work) if config.work else None
        if folder is None and config.out is not None and not config.out.endswith(".json"):
            folder = Path(config.out) / "work"
        keep = Path(config.keep) if config.keep else None
        # The facts that decide the images, and those that decide the rows.
        if folder is not None or keep is not None:
            images = image_count(source, self.protocol, self._count(source), config.allow_fewer)
            drawn = {"source": dict(source.facts), "images": images}
            if keep is not None:
                open_work(keep, drawn, file=_IMAGES_RECORD, holds="images")
            if folder is not None:
                open_work(folder, drawn | self._measured_facts(config.part))
        return MeasureOptions(batch_size=config.batch_size, folder=folder, keep=keep, part=config.part)

    def _measured_facts(self, part: int) -> dict[str, Any]:
        """What decides the rows of a work folder besides its images."""
        return {
            "against": dict(self.other.facts) if self.other else None,
            "settings": self.protocol.settings(),
            "networks": self.networks.models(),
            "metrics": sorted(self.metrics),
            "part": part,
        }


def _noise_seed(files: ImageFiles) -> int | None:
    """Seed of the noise of images that `d2g eval run --keep` or `d2g sample` wrote; None if not recorded."""
    if not files.pictures:
        return None
    facts = files.pictures[0].parent / _IMAGES_RECORD
    if facts.is_file():
        source = read_json_object(facts, f"delete {facts.parent} and evaluate again").get("source")
        seed = source.get("seed") if isinstance(source, dict) else None
        return seed if isinstance(seed, int) else None
    text = png_text(files.pictures[0])
    return int(text["seed"]) if text.keys() >= {"seed", "index"} and text["seed"].isdecimal() else None


def _expect_no_gap(files: ImageFiles) -> None:
    """Raise UserError for a folder of `--keep` that lacks an image: those after it would pair with others."""
    if not files.pictures or not (files.pictures[0].parent / _IMAGES_RECORD).is_file():
        return
    for number, picture in enumerate(files.pictures):
        if picture.stem.isdecimal() and int(picture.stem) != number:
            raise UserError(
                f"{files.name} lacks image {number:,}: {picture.name} is in its place; images are compared "
                "by their numbers, so evaluate again with --keep"
            )


def _sides_note(counts: Mapping[str, int]) -> str:
    """Return a note if precision and recall compare unequal numbers of images, on which they depend; else
    ""."""
    generated, real = counts.get("pr_images"), counts.get("pr_reference")
    if generated == real:
        return ""
    log_once(
        note
        := f"precision, recall and their like compare {generated:,} generated with {real:,} real images; "
        "results of other numbers differ by that alone"
    )
    return note


def _first_note(source: ImageSource, measured: int) -> str:
    """Return a note if not all images of a folder are measured; else ""."""
    if source.count is None or source.count <= measured:
        return ""
    log_once(note := f"measured the first {measured} of {source.count} images of {source.name}")
    return note


def _networks_of(metrics: Sequence[str]) -> set[str]:
    """The networks of metrics, as `--weights NAME=PATH` names them."""
    return {network for name in metrics for network in all_metrics()[name].networks}


def _without_zero(guidance: float | None) -> float | None:
    """A guidance of 0 means none, as 1 does."""
    return 1.0 if guidance == 0 else guidance


def read_list(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file in order. Repeated prompts stay: a protocol counts them, and COCO has some."""
    prompts = [text for cell in prompt_cells(path, column) if (text := prompt_text(path, cell))]
    if not prompts:
        raise UserError(f"{path} holds no prompts, expected at least one; check --prompts")
    return prompts
