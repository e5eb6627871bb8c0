"""The checks that load a model or open an archive; `validate_models.py` runs them all."""

from mvlm_core.export import validation
from mvlm_core.export.file_checks import Checks
from mvlm_core.export.manifest import read_manifest
from tests.export.exports import pack, seal, set_json


def test_exports_that_import_this_repository_fail_the_loading_check(export):
    (export / "modeling.py").write_text("import mvlm_core.export.archive\nclass Model: ...\n")
    code = {"AutoConfig": "modeling.Model", "AutoModelForCausalLM": "modeling.Model"}
    set_json(export / "config.json", model_type="odd", auto_map=code)
    seal(export)
    checks = Checks()
    validation.check_loading(export, list(read_manifest(export)["files"]), checks, prompts=(), texts=[])
    (found,) = checks
    assert (
        not found.passed
        and "imports a module of the training repository" in found.detail
        and "config.json" in found.detail
    )


def test_archive_checks_detect_damage_and_mismatches(export, monkeypatch):
    layout = pack(export)

    def found():
        checks = Checks()
        validation.check_packed("archive", layout.archive("mvlm_gpt2"), export, layout, checks)
        return {check.name for check in checks if not check.passed}

    assert found() == set()
    layout.checksums.write_text(f"{'0' * 64}  mvlm_gpt2_model.tar.gz\n")
    assert found() == {"SHA256SUMS"}
    pack(export)
    (export / "README.md").write_text("another card\n")
    seal(export)
    assert found() == {"intact and equal to the export"}
    data = bytearray(layout.archive("mvlm_gpt2").read_bytes())
    data[len(data) // 2] ^= 1
    layout.archive("mvlm_gpt2").write_bytes(data)
    assert found() == {"SHA256SUMS", "intact and equal to the export"}
    layout.archive("mvlm_gpt2").unlink()
    assert found() == {"exists"}
