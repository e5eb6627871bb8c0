"""`models/training_summary.json`, written after every change so that it is up to date after a crash."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from mvlm_core.export.manifest import export_bytes, hardware_name, training_config
from mvlm_core.export.strict_tar import name_problem
from mvlm_core.files import read_json, write_json_atomic
from mvlm_core.metrics import METRICS
from mvlm_core.run_layout import Layout, finite_number


def timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _entry(status: str, results: dict[str, Any], archive: object = None) -> dict[str, Any]:
    """Entry of a model: status, archive and the value of every metric, None if missing or damaged."""
    numbers = {metric.name: finite_number(results.get(metric.name)) for metric in METRICS}
    return {"status": status} | numbers | {"archive": archive if isinstance(archive, str) else None}


def finished_models(layout: Layout) -> dict[str, dict[str, Any]]:
    """Entries of the models that the last run finished or kept, as long as their export exists."""
    models = read_json(layout.summary).get("models")
    return {
        name: entry
        for name, entry in (models.items() if isinstance(models, dict) else ())
        if not ("/" in name or name_problem(name))
        and isinstance(entry, dict)
        and entry.get("status") == "finished"
        and training_config(layout.export(name))
    }


class Summary:
    """Summary of a run: `models` by name, each with status, results and archive."""

    def __init__(self, layout: Layout, names: list[str], *, preset: str, device: str) -> None:
        self.layout, self._earlier = layout, read_json(layout.summary)
        kept = {
            name: _entry("finished", entry, entry.get("archive"))
            for name, entry in finished_models(layout).items()
            if name not in names
        }
        self.models: dict[str, dict[str, Any]] = kept | {name: _entry("waiting", {}) for name in names}
        self.value: dict[str, Any] = {"device": device, "preset": preset, "started": timestamp(), "finished": None}
        self.value |= {"models": self.models, "comparison": {}}
        self.save()

    def update(self, name: str, **values: Any) -> None:
        self.models[name].update(values)
        self.save()

    def take_results(self, name: str) -> None:
        """Record the results of a finished trainer.

        Raises:
            ArchiveError, OSError: its export is incomplete.
        """
        export = self.layout.export(name)
        config = training_config(export)
        if (hardware := config.get("hardware") or {}).get("device"):
            self.value["device"] = f"{hardware['device']}: {hardware_name(hardware)}"
        self.update(name, **_entry("finished", (config.get("results") or {}) | {"size_bytes": export_bytes(export)}))

    def with_status(self, status: str) -> list[str]:
        return [name for name, entry in self.models.items() if entry["status"] == status]

    def was_in_earlier_run(self, name: str) -> bool:
        models = self._earlier.get("models")
        return isinstance(models, dict) and name in models

    def save(self) -> None:
        write_json_atomic(self.layout.summary, self.value)

    def restore(self) -> None:
        """Put back the earlier run's summary, if there is one, because this run has changed nothing."""
        if self._earlier:
            write_json_atomic(self.layout.summary, self._earlier)

    def copy_to_downloads(self) -> None:
        write_json_atomic(self.layout.downloads / self.layout.summary.name, self.value)

    def close(self) -> None:
        """Record the end of the run, also in the copy next to the archives.

        If every model is finished with the results of the earlier run, nothing was trained: that run's dates are kept.
        """
        kept = self._earlier.get("finished") and self._earlier.get("models") == self.models
        if kept and self.with_status("finished") == list(self.models):
            self.value |= {key: self._earlier.get(key) for key in ("started", "finished")}
        else:
            self.value["finished"] = timestamp()
        self.save()
        self.copy_to_downloads()
