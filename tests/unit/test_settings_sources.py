"""The sources of settings, how mistakes in them are reported, and how settings are printed."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpudock_server import __main__
from gpudock_server.settings import sources
from gpudock_server.settings.definitions import Settings
from gpudock_server.settings.sources import LoadedSettings, SettingsInvalid, load
from gpudock_server.startup import StartupError
from hypothesis import given
from hypothesis import strategies as st

TIME = "engine_timeout: must be a number of seconds, or have a unit: ms, s, m, h, d"
EXAMPLE = Path(__file__).parents[2] / "deploy" / "gpudockd.toml"


@pytest.fixture(autouse=True)
def _ignore_settings_of_this_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "DEFAULT_CONFIG", tmp_path / "default.toml")
    for name in ("CONFIG", *Settings.model_fields):
        monkeypatch.delenv(f"GPUDOCK_{name.upper()}", raising=False)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def mistakes(*arguments: str) -> tuple[str, ...]:
    with pytest.raises(SettingsInvalid) as raised:
        load(arguments)
    return raised.value.lines


def test_flags_override_the_environment_which_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path / "c.toml", 'max_execs = 1\nengine_timeout = 1\nstore_timeout = "1m"\n')
    monkeypatch.setenv("GPUDOCK_MAX_EXECS", "2")
    monkeypatch.setenv("GPUDOCK_ENGINE_TIMEOUT", "2")
    loaded = load(["--config", config, "--max-execs", "3"])
    settings = loaded.settings
    assert (settings.max_execs, settings.engine_timeout, settings.store_timeout, settings.settle_period) == (
        3,
        2,
        60,
        0.5,
    )
    assert loaded.origins == {
        "max_execs": "--max-execs",
        "engine_timeout": "GPUDOCK_ENGINE_TIMEOUT",
        "store_timeout": config,
    }


def test_the_config_file_is_given_by_flag_or_environment_or_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load([]).settings.max_execs == 512
    write(tmp_path / "default.toml", "max_execs = 1")
    assert load([]).settings.max_execs == 1
    monkeypatch.setenv("GPUDOCK_CONFIG", write(tmp_path / "by-environment.toml", "max_execs = 2"))
    assert load([]).settings.max_execs == 2
    assert load(["--config", write(tmp_path / "by-flag.toml", "max_execs = 3")]).settings.max_execs == 3


def test_an_empty_value_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'listen = ["127.0.0.1:50051"]\ntoken_file = "/t"\nallowed_host_paths = ["/data"]\n'
    config = write(tmp_path / "c.toml", text)
    monkeypatch.setenv("GPUDOCK_ALLOWED_HOST_PATHS", "")
    settings = load(["--config", config, "--socket", "", "--listen", "[::1]:1"]).settings
    assert (settings.socket, settings.listen, settings.allowed_host_paths) == (None, ("[::1]:1",), ())


def test_list_flags_can_be_repeated_or_joined_by_commas() -> None:
    arguments = ["--allowed-host-paths", "/a,/b", "--allowed-host-paths", "/c", "--layer-carry", "copy"]
    assert load(arguments).settings.allowed_host_paths == (Path("/a"), Path("/b"), Path("/c"))


def test_every_mistake_is_one_line_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "c.toml", 'state_dir = "var"\nprot_range = "1-2"\n[etcd]\nca = "/a"\n')
    monkeypatch.setenv("GPUDOCK_ENGINE_TIMEOUT", "soon")
    assert mistakes("--config", config, "--max-execs", "many", "--log-level", "loud") == (
        f"state_dir: must be an absolute path without `..`, not 'var' ({config})",
        f"{TIME}, not 'soon' (GPUDOCK_ENGINE_TIMEOUT)",
        "max_execs: must be a valid integer, unable to parse string as an integer, not 'many' (--max-execs)",
        "log_level: must be 'debug', 'info', 'warning' or 'error', not 'loud' (--log-level)",
        f"prot_range: unknown setting; did you mean port_range? ({config})",
        f"etcd: unknown setting; did you mean etcd_ca? ({config})",
    )


def test_conflicting_settings_are_reported_with_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUDOCK_SOCKET", "")
    monkeypatch.setenv("GPUDOCK_TLS_CERT", "/c")
    assert mistakes("--tls-client-ca", "/ca") == (
        "socket, listen: at least one of both is required (GPUDOCK_SOCKET)",
        "tls_cert, tls_key: must be set together (GPUDOCK_TLS_CERT)",
    )


def test_an_unreadable_config_file_is_one_line(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    assert mistakes("--config", missing) == (f"{missing}: No such file or directory",)
    bad = write(tmp_path / "bad.toml", "max_execs = \n")
    (line,) = mistakes("--config", bad)
    assert line.startswith(f"{bad}: Invalid value (at line 1")
    (tmp_path / "latin.toml").write_bytes(b'socket_group = "\xe9"\n')
    (line,) = mistakes("--config", str(tmp_path / "latin.toml"))
    assert "utf-8" in line


def test_an_unknown_or_abbreviated_flag_is_refused() -> None:
    assert mistakes("--nope", "1") == ("unrecognized arguments: --nope 1", "see gpudockd --help")
    assert "unrecognized" in mistakes("--max", "1")[0]


def test_printed_settings_load_as_the_same_settings(tmp_path: Path) -> None:
    arguments = [
        *("--listen", "127.0.0.1:50051,[::1]:50051", "--token-file", "/etc/t", "--socket", ""),
        *("--port-range", "30000-30009", "--allowed-host-paths", '/da"ta,/é\x7f', "--settle-period", "250ms"),
        *("--socket-mode", "0600", "--layer-carry", "exchange", "--docker-host", "tcp://127.0.0.1:2375"),
    ]
    first = load(arguments)
    again = load(["--config", write(tmp_path / "printed.toml", first.to_toml())])
    assert again.settings == first.settings
    assert again.to_toml().splitlines()[0].endswith(f"# {tmp_path / 'printed.toml'}")
    assert 'port_range = "30000-30009"  # --port-range' in first.to_toml().splitlines()
    assert set(tomllib.loads(first.to_toml())) == set(Settings.model_fields)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_is_printed_as_valid_toml(text: str) -> None:
    printed = LoadedSettings(Settings(socket_group=text), {}).to_toml()
    assert tomllib.loads(printed)["socket_group"] == text


def test_the_example_configuration_loads() -> None:
    load(["--config", str(EXAMPLE)])


def test_the_example_configuration_has_every_setting_with_its_default() -> None:
    """Lines that are commented out have the value that is in effect without them."""
    text = EXAMPLE.read_text()
    own = {"node_name", "host_id"}  # made from the host
    uncommented = "\n".join(
        line.removeprefix("#") for line in text.splitlines() if line.startswith("#") and line[1:2].isalpha()
    )
    found = tomllib.loads(uncommented)
    assert set(found) == set(Settings.model_fields)
    defaults = tomllib.loads(LoadedSettings(Settings(), {}).to_toml())
    assert {name: value for name, value in found.items() if name not in own} == {
        name: value for name, value in defaults.items() if name not in own
    }


def test_gpudockd_prints_valid_settings_and_refuses_invalid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--print-config", "--max-execs", "3"]) == 0
    assert "max_execs = 3  # --max-execs\n" in capsys.readouterr().out
    assert __main__.main(["--print-config", "--max-execs", "0"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "gpudockd: max_execs: must be greater than or equal to 1, not '0' (--max-execs)\n"


def test_a_daemon_that_cannot_start_reports_the_reason_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(settings: Settings) -> int:
        raise StartupError(f"cannot listen on {settings.socket}: Permission denied", "run as root")

    monkeypatch.setitem(sys.modules, "gpudock_server.app", SimpleNamespace(run=run))
    monkeypatch.setattr("gpudock_server.app", sys.modules["gpudock_server.app"], raising=False)
    assert __main__.main(["--socket", "/x.sock"]) == 1
    assert capsys.readouterr().err == ("gpudockd: cannot listen on /x.sock: Permission denied\ngpudockd: run as root\n")


def test_help_and_print_config_load_neither_the_daemon_nor_its_libraries() -> None:
    code = (
        "import sys\n"
        "from gpudock_server.__main__ import main\n"
        "main(['--print-config'])\n"
        "heavy = {'grpc', 'aiodocker', 'aetcd', 'pynvml', 'gpudock_server.app'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        [sys.executable, "-m", "gpudock_server", "--help"], check=True, capture_output=True, text=True
    )
    flags = [f"--{name.replace('_', '-')} " for name in Settings.model_fields]
    assert [flag for flag in flags if flag not in done.stdout] == []
    assert "Exit codes: 0 after a clean shutdown" in done.stdout
