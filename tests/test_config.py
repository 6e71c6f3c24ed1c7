import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf

import qat.config as config
from qat.diagnosis import WidthSearch
from qat.estimators import DSQ, LSQ, SEQ, STE, LSQPlus
from qat.scheme import QuantScheme, QuantSpec, SchemeMap

RECIPES = sorted(config.RECIPES.glob("*.yaml"))
OPTIONS = [
    f"{group}={option}" for group, options in config.choices().items() if group != "recipe" for option in options
]


@pytest.fixture(autouse=True)
def hydra():
    config.register_recipes()
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(config.CONF)):
        return compose("config", overrides=list(overrides))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe of the user's, offered beside the real ones for one test."""
    group = ConfigStore.instance().repo.setdefault("recipe", {})
    before = dict(group)
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str) -> None:
        (tmp_path / "recipes" / f"{name}.yaml").write_text(content)
        config.register_recipes()

    yield write
    group.clear()
    group.update(before)


def test_there_are_recipes_and_options():
    assert {p.stem for p in RECIPES} >= {"llama_int4_qat"}
    assert {"quant=w4a16", "calibration=mse", "data=chat", "model=hf"} <= set(OPTIONS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_composes_without_an_unknown_key(path):
    config.check_overrides([f"recipe={path.stem}"])
    assert isinstance(instantiate(composed(f"recipe={path.stem}").quant), (SchemeMap, WidthSearch))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_says_its_package_for_those_who_load_it_by_folder(path):
    assert path.read_text().startswith("# @package _global_\n")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_choose_a_quant_file_and_never_set_its_leaves(path):
    assert "quant" not in OmegaConf.load(path)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option):
    needed = {"data=chat": ["data.path=x.jsonl"], "model=hf": ["model.name=a/b"]}  # only the user knows these
    config.check_overrides([option, *needed.get(option, [])])


@pytest.mark.parametrize("name", config.choices()["quant"])
def test_every_quant_option_is_what_its_name_says(name):
    schemes = instantiate(composed(f"quant={name}").quant)
    if name == "none":
        assert not schemes.quantizes
        return
    if name == "auto":
        assert schemes.mixed({}).name == "auto4a16-g128"
        schemes = schemes.uniform(4)
        name = "w4a16"
    written = {"ternary": "w2a16-g64-narrow", "nested": "w8.4.2a16"}
    scheme, _, kind = written.get(name, name).partition("_")
    assert f"{schemes.name}-".startswith(scheme + "-")
    chosen = schemes.scheme_of("model.layers.0.mlp.up_proj")
    assert chosen is not None
    assert (kind == "asymmetric") == (chosen.input is not None and not chosen.input.symmetric)
    assert (schemes.scheme_of("lm_head") is None) == (kind != "conv")
    assert (kind == "conv") == ("conv" in schemes.kinds)


@pytest.mark.parametrize("name", config.choices()["calibration"])
def test_every_calibration_option_is_called_what_it_is(name):
    assert instantiate(composed(f"calibration={name}").calibration).name == name


@pytest.mark.parametrize("name", config.choices()["estimator"])
def test_every_estimator_option_is_what_the_quantization_callback_gets(name):
    callback = instantiate(composed(f"estimator={name}").callbacks.quantization)
    kinds = {
        "lsq": LSQ(),
        "lsq_log": LSQ(relative=True),
        "lsq_plus": LSQPlus(),
        "seq": SEQ(),
        "dsq": DSQ(),
        "ste": STE(),
    }
    kinds |= {f"ste_{follow}": STE(follow=follow) for follow in ("absmax", "mse")}
    assert callback.estimator == kinds[name]


def test_the_command_line_beats_the_recipe_and_the_recipe_beats_the_groups(recipe):
    recipe("mine", "# @package _global_\ndefaults:\n  - override /quant: w8a16\noptim:\n  lr: 0.5\nseed: 3\n")
    alone = composed("recipe=mine")
    assert (alone.optim.lr, alone.seed, alone.quant.weight.bits) == (0.5, 3, 8)
    assert composed().optim.lr not in (0.5, 0.25)
    beaten = composed("recipe=mine", "optim.lr=0.25", "quant=w4a8", "seed=4")
    assert (beaten.optim.lr, beaten.seed, beaten.quant.weight.bits) == (0.25, 4, 4)
    assert beaten.quant.weight.granularity == "group"


def test_a_recipe_of_the_users_may_not_be_called_as_another_of_ours(recipe):
    with pytest.raises(ValueError, match="give yours another name"):
        recipe("llama_int4_qat", "# @package _global_\nseed: 3\n")


def test_a_copy_of_our_recipe_is_that_recipe(recipe):
    recipe("llama_int4_qat", (config.RECIPES / "llama_int4_qat.yaml").read_text())
    assert config.choices()["recipe"].count("llama_int4_qat") == 1


def test_a_recipe_may_inherit_another(recipe):
    recipe("base", "# @package _global_\noptim:\n  lr: 0.5\nseed: 3\n")
    recipe("child", "# @package _global_\ndefaults:\n  - base\nseed: 4\n")
    config.check_overrides(["recipe=child"])
    child = composed("recipe=child")
    assert (child.optim.lr, child.seed) == (0.5, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sead: 3\n", "sead; did you mean seed?"),
        ("optim:\n  lrr: 0.5\n", "optim.lrr; did you mean lr?"),
        ("trainer:\n  max_step: 5\n", "trainer.max_step; did you mean max_steps?"),
        ("quant:\n  weight:\n    group_sise: 64\n", "quant.weight.group_sise; did you mean group_size?"),
        ("data:\n  source:\n    pathh: x\n", "data.source.pathh"),
        (
            "callbacks:\n  quantization:\n    freeze_shares: 0\n",
            "callbacks.quantization.freeze_shares; did you mean freeze_share?",
        ),
        (
            "data:\n  extra:\n    _target_: qat.data.documents.installed_packages\n    max_byte: 3\n",
            "data.extra.max_byte; did you mean max_bytes?",
        ),
        ("trainer:\n  callback: []\ntask:\n  warmupp: 1\n", "task.warmupp; did you mean warmup?"),
    ],
    ids=["top", "group", "signature", "nested", "source", "callback", "added target", "two"],
)
def test_a_misspelt_key_in_a_recipe_is_named_with_the_nearest(recipe, content, message):
    recipe("bad", "# @package _global_\n" + content)
    with pytest.raises(ValueError, match="unknown configuration keys") as error:
        config.check_overrides(["recipe=bad"])
    assert message in str(error.value)


def test_keys_that_a_signature_knows_may_be_set_though_no_file_names_them(recipe):
    recipe("good", "# @package _global_\ntrainer:\n  limit_val_batches: 2\noptim:\n  lr: 0.1\n")
    config.check_overrides(["recipe=good"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lr"),
        ("trainer.max_step=3", "trainer.max_steps"),
        ("quant.weight.group_sise=32", "quant.weight.group_size"),
        ("sead=1", "seed"),
        ("+optim.lrr=1", "optim.lrr; did you mean lr?"),
    ],
)
def test_a_misspelt_override_is_named_with_the_nearest(override, message):
    with pytest.raises(ValueError) as error:
        config.check_overrides(["recipe=llama_int4_qat", override])
    assert message in str(error.value)
    assert override.lstrip("+").partition("=")[0].split(".")[-1] in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "recipe=lama_int4_qat",
            r"no recipe is called 'lama_int4_qat'; did you mean llama_int4_qat\? There are: .*pretrain",
        ),
        ("quant=w4a61", r"no quant is called 'w4a61'; did you mean w4a16\? There are: auto, nested, none, ternary"),
        ("quant=w4a16,w8a61", r"no quant is called 'w8a61'; did you mean w8a16\?"),
        (
            "calibration=gptk",
            r"no calibration is called 'gptk'; did you mean gptq\? There are: absmax, adaround, awq, block_ap, entropy",
        ),
        (
            "recipe=null",
            "no recipe is called 'null'.* There are: .*llama_int4_awq, llama_int4_blockwise, .*llama_int4_qat",
        ),
        ("logger=wandbb", r"no logger is called 'wandbb'; did you mean wandb\?"),
    ],
)
def test_a_misspelt_choice_is_named_with_the_nearest(override, message):
    with pytest.raises(ValueError, match=message):
        config.check_overrides([override])


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=llama_int4_qat", "quant=w4a16,w8a16", "seed=0,1"],
        ["recipe=glob(*)"],
        ["seed=range(0,3)", "optim.lr=choice(1e-3,1e-4)", "data.name='a,b'", "hydra.sweep.dir=x"],
        ["hydra.run.dir=/tmp/x", "optim.betas=[0.8,0.9]"],
        ["model=hf", "model.name=a/b", "data=text", "data.source.path=docs/"],
        ["quant.weight.group_size=32,64"],
        ["+trainer.limit_val_batches=2"],
    ],
    ids=lambda words: " ".join(words),
)
def test_what_the_help_shows_is_accepted(overrides):
    config.check_overrides(overrides)


def test_a_value_that_only_the_user_knows_is_asked_for():
    with pytest.raises(ValueError, match=r"model\.name must be given: model\.name="):
        config.check_overrides(["recipe=llama_int4_qat", "model=hf"])


def test_every_recipe_of_a_sweep_is_checked_and_not_only_the_first(recipe):
    recipe("a_good", "# @package _global_\nseed: 1\n")
    recipe("bad", "# @package _global_\nsead: 1\n")
    config.check_overrides(["recipe=a_good"])
    for sweep in ("recipe=a_good,bad", "recipe=glob(*)", "recipe=choice(a_good,bad)"):
        with pytest.raises(ValueError, match="sead; did you mean seed"):
            config.check_overrides([sweep, "seed=0,1"])


@pytest.mark.parametrize("size", [32, 64])
def test_a_group_size_on_the_command_line_reaches_the_scheme(size):
    override = f"quant.weight.group_size={size}"
    config.check_overrides([override])
    assert instantiate(composed(override).quant).scheme_of("x").weight.group_size == size


def test_a_leaf_that_contradicts_its_file_is_refused_by_the_spec():
    with pytest.raises(Exception, match="group_size goes with granularity='group'"):
        instantiate(composed("quant=w8a16", "quant.weight.group_size=32").quant)


def test_overrides_of_layers_are_schemes_like_any_other(recipe):
    recipe(
        "mixed",
        """# @package _global_
quant:
  overrides:
    "*down_proj":
      _target_: qat.scheme.QuantScheme
      weight:
        _target_: qat.scheme.QuantSpec
        bits: 8
        granularity: channel
    "*v_proj": null
""",
    )
    config.check_overrides(["recipe=mixed"])
    schemes = instantiate(composed("recipe=mixed").quant)
    eight = schemes.scheme_of("layers.0.down_proj")
    assert type(eight) is QuantScheme
    assert eight == QuantScheme(weight=QuantSpec(bits=8, granularity="channel"))
    assert schemes.scheme_of("layers.0.v_proj") is None
    assert schemes.scheme_of("layers.0.q_proj").weight.bits == 4
    assert schemes.name == "w4a16-g128+mixed"
    assert QuantScheme.from_dict(eight.to_dict()) == eight


def test_choices_lists_every_group_of_the_root_config():
    defaults = OmegaConf.load(config.CONF / "config.yaml").defaults
    named = {next(iter(entry)) for entry in defaults if not isinstance(entry, str)} - {"sweep"}
    assert named <= set(config.choices())
