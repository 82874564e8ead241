"""Checks of power: sleep, the battery, low power mode, heat, and the display, which shares the GPU."""

from __future__ import annotations

from cluster.core.examination import Finding, Severity
from cluster.core.text import count_in_words
from cluster.doctor.readings import Readings
from cluster.platform.macos import parse_displays
from cluster.platform.pmset import FULL_SPEED, parse_power_settings, parse_power_source, parse_thermal_limit


def check_sleep(readings: Readings) -> list[Finding] | None:
    """Find a Mac that falls asleep when nobody uses it."""
    settings = parse_power_settings(readings.outputs.sleep)
    if "sleep" not in settings:
        return None
    if settings["sleep"] == 0 or settings.get("SleepDisabled"):
        return []
    what = f"the Mac sleeps after {count_in_words(settings['sleep'], 'idle minute')}"
    why = "A sleeping Mac answers nothing: the cluster counts it as lost and moves its layers."
    return [Finding(Severity.WARNING, what, why, "sudo pmset -c sleep 0, or run `caffeinate -i macpipe worker`")]


def check_power(readings: Readings) -> list[Finding] | None:
    """Find a Mac on battery, or in low power mode."""
    settings = parse_power_settings(readings.outputs.sleep)
    source = parse_power_source(readings.outputs.battery)
    if not settings and not source:
        return None
    found = []
    if source == "Battery Power":
        why = "macOS slows the GPU and sleeps sooner on battery."
        found.append(Finding(Severity.WARNING, "the Mac runs on battery", why, "connect its power adapter"))
    if settings.get("lowpowermode") == 1 or settings.get("powermode") == 1:
        why = "The GPU runs at a fraction of its speed, and every stage waits for the slowest Mac."
        found.append(Finding(Severity.WARNING, "low power mode is on", why, "sudo pmset -a lowpowermode 0"))
    return found


def check_heat(readings: Readings) -> list[Finding] | None:
    """Find a Mac that heat slows down."""
    if not readings.outputs.heat:
        return None
    limit = parse_thermal_limit(readings.outputs.heat)
    if limit >= FULL_SPEED:
        return []
    why = "Every stage waits for the slowest Mac."
    remedy = "let air reach it and open a closed lid; pmset -g therm shows the limit"
    return [Finding(Severity.WARNING, f"heat limits the processors to {limit}% of their speed", why, remedy)]


def check_display(readings: Readings) -> list[Finding] | None:
    """Find a display that is on: macOS gives it precedence over long work of the GPU (mlx issue 3267)."""
    shown = parse_displays(readings.outputs.displays)
    if shown is None:
        return None
    if not shown:
        return []
    why = (
        'macOS may end long work of the GPU that keeps a display waiting ("Impacting Interactivity"). The engine then'
        " restarts, and answers pause."
    )
    named = ", ".join(filter(None, shown))
    what = f"a display is on: {named}" if named else "a display is on"
    return [Finding(Severity.NOTE, what, why, "if engines end like this: sudo pmset -a displaysleep 1")]
