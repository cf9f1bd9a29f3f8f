"""Recipes and overrides: what they mean, how errors read, and that TOML written is TOML read."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooring.config.concept_settings import ConceptTuningSettings
from mooring.config.keys import METHODS, all_keys
from mooring.config.load import absolute_paths, config_from_toml, load_config, shipped_recipes, to_toml
from mooring.config.method_settings import CombinedSettings, DRTuneSettings, FineTuneSettings, LPFTSettings
from mooring.config.schema import RunConfig
from mooring.errors import ConfigError


def lines_of(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines()]


def recipe(folder: Path, text: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text(text, encoding="utf-8")
    return file


# ---------------------------------------------------------------- meaning


def test_the_data_alone_is_a_run() -> None:
    assert load_config(None, ["data=photos"]) == RunConfig.model_validate({"data": "photos"})


@pytest.mark.parametrize(
    "order",
    list(permutations(["data=photos", "data.augment=strong", "method=dr_tune", "method.bank_size=4096"])),
    ids=lambda order: "-".join(word[:9] for word in order),
)
def test_shorthands_merge_in_any_order(order: tuple[str, ...]) -> None:
    config = load_config(None, order)
    assert (config.data.path, config.data.augment) == (Path("photos"), "strong")
    assert config.method == DRTuneSettings(bank_size=4096)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.epochs=3", 3),
        ("train.epochs = 3", 3),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1.0),
        ("train.compile=true", True),
        ("optimizer.betas=[0.8, 0.95]", (0.8, 0.95)),
        ("model.name='vit_tiny_patch16_224'", "vit_tiny_patch16_224"),
        ("model.weights=none", "none"),
        ("model.weights=a=b.pth", "a=b.pth"),
        ("model.weights=3", "3"),
        ("train.image_size=none", None),
        ("schedule.name=step", "step"),
    ],
)
def test_values_are_typed(override: str, value: Any) -> None:
    config = load_config(None, ["data=photos", override])
    section, name = override.partition("=")[0].strip().split(".")
    got = getattr(getattr(config, section), name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("name", ["2024", "2024-11-20", "true", "my photos", "bücher", "'quoted dir'", "a]b"])
def test_any_folder_name_is_a_path(name: str) -> None:
    assert load_config(None, [f"data={name}"]).data.path == Path(name.strip("'"))


def test_the_home_folder_is_expanded() -> None:
    config = load_config(None, ["data=~/photos", "out=~/run"])
    assert config.data.path == Path.home() / "photos"
    assert config.out == Path.home() / "run"


def test_a_later_override_wins() -> None:
    assert load_config(None, ["data=a", "train.epochs=3", "train.epochs=4", "data.path=b"]).train.epochs == 4


def test_an_inline_table_sets_single_keys() -> None:
    config = load_config(None, ["data=a", "train.batch_size=8", "train={epochs = 3, mixup = 0.2}"])
    assert (config.train.batch_size, config.train.epochs, config.train.mixup) == (8, 3, 0.2)


def test_method_settings_without_a_name_are_the_default_methods() -> None:
    assert load_config(None, ["data=a", "method.bank_size=7"]).method == DRTuneSettings(bank_size=7)
    assert RunConfig.model_validate({"data": "a", "method": {"bank_size": 7}}).method.name == "dr_tune"


def test_a_recipe_may_use_the_short_forms_and_is_overridden(tmp_path: Path) -> None:
    file = recipe(tmp_path, 'data = "photos"\nmethod = "lp_ft"\n[train]\nepochs = 7\nbatch_size = 4\n')
    config = load_config(file, ["train.epochs=9", "method.probe_fraction=0.5"])
    assert (config.data.path, config.train.epochs, config.train.batch_size) == (Path("photos"), 9, 4)
    assert config.method == LPFTSettings(probe_fraction=0.5)


def test_another_method_replaces_the_recipes_method_table(tmp_path: Path) -> None:
    file = recipe(tmp_path, 'data = "a"\n[method]\nname = "dr_tune"\nbank_size = 64\n')
    assert load_config(file, ["method=fine_tune"]).method == FineTuneSettings()
    assert load_config(file, ["method=dr_tune"]).method == DRTuneSettings(bank_size=64)


def test_the_default_methods_table_is_replaced_too(tmp_path: Path) -> None:
    file = recipe(tmp_path, 'data = "a"\n[method]\nbank_size = 64\n')
    assert load_config(file, ["method=fine_tune"]).method == FineTuneSettings()


def test_paths_are_relative_to_the_current_folder(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    assert load_config(recipe(folder, 'data = "photos"\n')).data.path == Path("photos")


def test_a_short_run_warms_up_for_a_fifth() -> None:
    assert load_config(None, ["data=a", "train.epochs=1"]).schedule.warmup_epochs == pytest.approx(0.2)


def test_resume_takes_the_runs_own_settings(tmp_path: Path) -> None:
    first = load_config(None, ["data=photos", "method=lp_ft", "train.epochs=9"])
    (tmp_path / "config.toml").write_text(to_toml(first), encoding="utf-8")
    config = load_config(None, [f"resume={tmp_path}", "train.epochs=12"])
    assert config == load_config(
        None, ["data=photos", "method=lp_ft", "train.epochs=12", f"resume={tmp_path}", f"out={tmp_path}"]
    )


# ---------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_shipped_recipes_load(name: str) -> None:
    config = load_config(name, ["data=photos"])
    assert load_config(None, ["data=photos"]) != config, "a recipe that changes nothing is of no use"


def test_the_papers_recipe_holds_the_papers_numbers() -> None:
    config = load_config("dr_tune_paper", ["data=photos"])
    assert isinstance(config.method, DRTuneSettings)
    assert config.optimizer.head_lr_multiplier == 1 + config.method.bank_size / config.train.batch_size == 33
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("sgd", 0.01, 1e-4)
    assert (config.train.epochs, config.schedule.name, config.schedule.warmup_epochs) == (100, "cosine", 0.0)


def test_recipes_of_one_protocol_agree_and_name_their_source() -> None:
    """What is compared under TLlib's protocol differs in the method, and in the decay that some replace."""
    # Concept-Tuning's code has a schedule of its own
    names = [name for name in shipped_recipes() if name.endswith("_cub") and name != "concept_tuning_cub"]
    assert len(names) >= 9
    first = load_config(names[0], ["data=photos"])
    for name in names:
        config = load_config(name, ["data=photos"])
        for table in ("data", "model", "train", "schedule"):
            assert getattr(config, table) == getattr(first, table), (name, table)
        same = {"weight_decay": 0.0}
        assert config.optimizer.model_copy(update=same) == first.optimizer.model_copy(update=same), name
        assert name == f"{config.method.name}_cub"
        pulled = config.method.name in ("l2_sp", "delta", "feature_map")
        assert config.optimizer.weight_decay == (0.0 if pulled else 5e-4)
    ours = {"quick", "vit_adamw", "vit_base", "vit_large", "vit_huge"}  # of no one paper
    for name in set(shipped_recipes()) - ours:
        assert "\n# Source: " in shipped_recipes()[name].read_text(encoding="utf-8"), name


def test_every_method_with_a_published_setting_has_a_recipe() -> None:
    names = {load_config(name, ["data=photos"]).method.name for name in shipped_recipes()}
    # a probe and plain fine-tuning are what others are measured by; LP-FT and FitNets publish grids, not a setting
    assert set(METHODS) - names <= {"fine_tune", "linear_probe", "lp_ft", "feature_distillation"}


def test_concept_tunings_recipe_holds_the_codes_numbers() -> None:
    config = load_config("concept_tuning_cub", ["data=photos"])
    assert isinstance(config.method, ConceptTuningSettings)
    # 40 epochs of 500 batches of 48 over the 5,095 images that a validation split leaves of CUB
    assert config.train.epochs == -(-40 * 500 * 48 // 5095) - 1
    assert config.schedule.milestones == (12 / 40, 24 / 40) and config.method.negative_classes == 199


def test_a_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick").write_text('data = "here"\n', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load_config("quick").data.path == Path("here")


# ---------------------------------------------------------------- errors


def test_all_errors_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(
            None,
            [
                "train.epoch=3",
                "train.batch_size=many",
                "train.image_size=8",
                "optimizer.name=adam",
                "optimizer.betas=[0.9, 1.5]",
                "schedule.milestones=[0.8, 0.6]",
                "seed=true",
                "train=4",
                "train.compile=yes",
                "method=fine_tune",
                "method.bank_size=4",
                "epochs",
            ],
        )
    heading, *lines = lines_of(error)
    assert heading == "12 settings are wrong:"
    assert sorted(lines) == sorted(
        [
            'epochs: got "epochs"; expected key=value, as in train.epochs=20',
            "train.epoch: got 3; there is no such key, the nearest is train.epochs",
            "train: got 4; expected a table of settings, such as train.epochs",
            "method.bank_size: got 4; method fine_tune has no such key, it belongs to dr_tune",
            "data: got nothing; expected the images: add data=DIR",
            "seed: got true; expected an integer >= 0 and < 2147483648",
            'train.batch_size: got "many"; expected an integer >= 1',
            "train.image_size: got 8; expected an integer from 16 to 4096, or none",
            'train.compile: got "yes"; expected true or false',
            'optimizer.name: got "adam"; expected one of sgd, adamw, lamb; the nearest is adamw',
            "optimizer.betas: got [0.9, 1.5]; expected a list of 2 numbers >= 0 and < 1",
            "schedule.milestones: got [0.8, 0.6]; milestones must increase, as in [0.6, 0.8]",
        ]
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.epochs=3.5", "train.epochs: got 3.5; expected an integer from 1 to 100000"),
        ("train.epochs='3'", 'train.epochs: got "3"; expected an integer from 1 to 100000'),
        ("train.mixup=true", "train.mixup: got true; expected a number >= 0"),
        ("train.mixup=nan", "train.mixup: got NaN; expected a number >= 0"),
        ("optimizer.lr=inf", "optimizer.lr: got Infinity; expected a number > 0, or none"),
        ("optimizer.lr=0", "optimizer.lr: got 0; expected a number > 0, or none"),
        ("optimizer.betas=[0.9]", "optimizer.betas: got [0.9]; expected a list of 2 numbers >= 0 and < 1"),
        ("model.name=", 'model.name: got ""; expected text, not empty'),
        ("train.epochs=1\nseed=3", 'train.epochs: got "1\\nseed=3"; expected an integer from 1 to 100000'),
        ("train.epochs={x=1}", "train.epochs.x: got 1; there is no such key, the nearest is train.epochs"),
        (
            "method=dr_tun",
            'method.name: got "dr_tun"; expected one of '
            + ", ".join(METHODS)
            + ", or a list of those that combine; the nearest is dr_tune",
        ),
        ("=3", '=3: got "=3"; expected key=value, as in train.epochs=20'),
    ],
)
def test_one_wrong_setting_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["data=photos", override])
    assert lines_of(error) == ["1 setting is wrong:", line]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.extra_test=photos", 'data.extra_test: got "photos"; expected a table of NAME = a path'),
        ("data.extra_test.a.b=c", "expected names of letters, digits, - and _; got 'a.b'"),
        ("data.extra_test.a=", "a: expected a path; got empty text"),
        ("data.extra_tests.a=b", "there is no such key, the nearest is data.extra_test"),
        ("method.head_lr=fast", 'method.head_lr: got "fast"; expected a number > 0 or auto, or none'),
        ("method.head_lr=0", "method.head_lr: got 0; expected a number > 0 or auto, or none"),
    ],
)
def test_a_wrong_table_or_union_is_one_line(override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, ["data=photos", "method=daft", override])
    _, only = lines_of(error)
    assert line in only


def test_sgd_with_nesterov_needs_momentum() -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer: nesterov needs momentum > 0: set optimizer\.nesterov=false"
    ):
        load_config(None, ["data=a", "optimizer.name=sgd", "optimizer.momentum=0.0"])
    load_config(None, ["data=a", "optimizer.name=sgd", "optimizer.momentum=0.0", "optimizer.nesterov=false"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quik", "no such recipe file; shipped recipes are .*, the nearest is quick"),
        ("nowhere.toml", "no such recipe file"),
        (".", r"expected a recipe \(a TOML file\), got a folder; for a folder of images write data=\."),
    ],
)
def test_a_wrong_recipe_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(name)


@pytest.mark.parametrize("content", [b"epochs = ", b"\xff\xfe", b"[train\nepochs = 3"])
def test_a_broken_recipe_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml: (not valid TOML|cannot be read)"):
        load_config(file, ["data=photos"])


def test_a_recipes_errors_are_listed_with_the_overrides(tmp_path: Path) -> None:
    file = recipe(tmp_path, "[train]\nepoch = 3\nbatch_size = 0\n")
    with pytest.raises(ConfigError) as error:
        load_config(file, ["data=a", "seed=-1"])
    assert len(lines_of(error)) == 4


# ---------------------------------------------------------------- and back


@pytest.mark.parametrize("method", list(METHODS))
def test_toml_round_trip_of_every_method(method: str) -> None:
    config = load_config(None, ["data=photos", f"method={method}"])
    assert config_from_toml(to_toml(config)) == config


def test_extra_test_sets_are_a_table_of_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = recipe(tmp_path, 'data = "photos"\n')
    overrides = ["data.extra_test.sketch=2024", 'data.extra_test={art="a b", web-2="~/w"}']
    config = load_config(file, overrides)
    assert config.data.extra_test == {
        "sketch": Path("2024"), "art": Path("a b"), "web-2": Path("~/w").expanduser(),
    }  # fmt: skip
    assert config_from_toml(to_toml(config)) == config
    monkeypatch.chdir(tmp_path)
    assert absolute_paths(config).data.extra_test["sketch"] == tmp_path / "2024"
    again = load_config(
        recipe(tmp_path, to_toml(config)), ["data.extra_test.art=none", "data.extra_test.sketch=c"]
    )
    assert again.data.extra_test == {"sketch": Path("c"), "web-2": Path("~/w").expanduser()}


@pytest.mark.parametrize("given", ['method=["lp_ft", "dr_tune"]', "method=lp_ft+dr_tune"])
def test_toml_round_trip_of_a_combination(given: str) -> None:
    config = load_config(None, ["data=photos", given, "method.bank_size=64", "method.probe_fraction=0.5"])
    assert config.method == CombinedSettings(
        parts=(LPFTSettings(probe_fraction=0.5), DRTuneSettings(bank_size=64))
    )
    assert config_from_toml(to_toml(config)) == config


def test_a_combination_refuses_settings_of_other_methods_and_a_method_twice() -> None:
    with pytest.raises(ConfigError, match=r"method lp_ft\+fine_tune has no such key, it belongs to dr_tune"):
        load_config(None, ["data=photos", "method=lp_ft+fine_tune", "method.bank_size=64"])
    with pytest.raises(ConfigError, match="each method once; got lp_ft, lp_ft"):
        load_config(None, ["data=photos", "method=lp_ft+lp_ft"])
    with pytest.raises(ConfigError, match="dr_tun"):
        load_config(None, ["data=photos", "method=dr_tun+lp_ft"])


_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)


@given(
    path=_TEXT.filter(lambda text: text.strip() and not text.startswith("~")),
    name=_TEXT,
    weights=_TEXT,
    seed=st.integers(0, 2**31 - 1),
    lr=st.none() | st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    milestones=st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), unique=True).map(sorted),
    warmup=st.floats(0, 1e6),
    image_size=st.none() | st.integers(16, 4096),
)
def test_toml_round_trip_is_exact(
    path: str, name: str, weights: str, seed: int, lr: float | None, betas: tuple[float, float],
    milestones: list[float], warmup: float, image_size: int | None,
) -> None:  # fmt: skip
    config = RunConfig.model_validate(
        {
            "data": path,
            "seed": seed,
            "model": {"name": name, "weights": weights},
            "train": {"image_size": image_size},
            "optimizer": {"lr": lr, "betas": betas},
            "schedule": {"milestones": milestones, "warmup_epochs": warmup},
        }
    )
    assert config_from_toml(to_toml(config)) == config


def test_toml_leaves_out_what_is_none_and_names_the_rest() -> None:
    text = to_toml(load_config(None, ["data=photos"]))
    for key in all_keys().values():
        if key.default is not None and key.methods in ((), ("dr_tune",)):
            written = f"[{key.name}]" if key.table else f"{key.name.rpartition('.')[2]} = "
            assert written in text
    assert "none" not in text.lower()


def test_a_run_to_resume_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as missing:
        load_config(None, ["resume=nope"])
    assert str(missing.value) == "resume: expected a run folder, got nope"
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ConfigError, match=r"resume: expected a run folder \(with a config\.toml\), got empty"
    ):
        load_config(None, ["resume=empty"])


def test_a_continued_run_stays_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r1").mkdir()
    (tmp_path / "r1" / "config.toml").write_text(to_toml(load_config(None, ["data=photos"])))
    with pytest.raises(ConfigError, match="leave out= out, or give the same folder"):
        load_config(None, ["resume=r1", "out=r5"])
    assert load_config(None, ["resume=r1", f"out={tmp_path / 'r1'}"]).out == tmp_path / "r1"
    assert load_config(None, ["resume=r1"]).out == Path("r1")


def test_saved_paths_hold_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data=photos", "model.name=local-dir:net", "model.weights=w/a.pth", "out=run"]
    config = absolute_paths(load_config(None, words))
    assert config.data.path == tmp_path / "photos"
    assert config.model.name == f"local-dir:{tmp_path / 'net'}"
    assert config.model.weights == str(tmp_path / "w" / "a.pth")
    assert config.out == Path("run"), "a run folder may be moved"
    assert absolute_paths(config) == config
    assert config_from_toml(to_toml(config)) == config


@pytest.mark.parametrize("weights", ["auto", "none"])
def test_words_are_no_paths(weights: str) -> None:
    config = load_config(None, ["data=/photos", f"model.weights={weights}"])
    assert absolute_paths(config) == config


def test_errors_of_a_combination_name_the_users_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            None,
            ["data=photos", "method=dr_tune+tes", "method.bank_size=-1", "method.tau=0", "train.epochs=0"],
        )
    assert str(caught.value).splitlines()[1:] == [
        "  method.bank_size: got -1; expected an integer >= 0",
        "  method.tau: got 0; expected a number >= 0.001",
        "  train.epochs: got 0; expected an integer from 1 to 100000",
    ]
    for wrong in ("method=dr_tune+nope", "method=[]", "method=+"):
        with pytest.raises(ConfigError, match=r"method\.name: got .*; expected one of") as caught:
            load_config(None, ["data=photos", wrong])
        assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["encoders/clip", "names.npz", "names.npz:birds"])
def test_the_text_of_tes_does_not_depend_on_the_folder(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for method in ("tes", "daft+tes"):
        config = absolute_paths(load_config(None, ["data=photos", f"method={method}", f"method.text={text}"]))
        settings = config.method.parts[1] if isinstance(config.method, CombinedSettings) else config.method
        assert settings.text == str(tmp_path / text)  # type: ignore[union-attr]
    config = absolute_paths(load_config(None, ["data=photos", "method=tes"]))
    assert config.method.text == "auto"  # type: ignore[union-attr]
