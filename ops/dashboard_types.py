#!/usr/bin/env python3
"""Check the Grafana dashboard against the TypeScript types of npm's @grafana/schema: python ops/dashboard_types.py.

It needs npm and the network: the types and the compiler go into a temporary folder. A field that Grafana does not know,
or a value that it does not take, is an error of the compiler, and the exit code is 1.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

DASHBOARD: Final = Path(__file__).resolve().parent / "grafana" / "macpipe.json"
PACKAGES: Final = ("@grafana/schema@13", "typescript@7")
INSTALL_S: Final = 300
COMPILE_S: Final = 300
PANELS: Final = {"timeseries": "timeseries", "stat": "stat", "state-timeline": "statetimeline"}
"""The folder of each type of panel in the package."""
TYPES: Final = "@grafana/schema/dist/types/raw/composable/{}/panelcfg/x/types.gen"
PLAIN: Final = """
type Plain<T> = T extends string ? `${T}`
  : T extends number | boolean | null | undefined ? T
  : T extends readonly (infer E)[] ? Plain<E>[]
  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
"""
"""A type as JSON has it: with the texts of its enumerations."""


def as_typescript(dashboard: dict[str, Any]) -> str:
    """Return a program that compiles if each part of the dashboard has its type."""
    lines = ['import type { Dashboard } from "@grafana/schema";']
    lines += [f'import type * as {folder} from "./node_modules/{TYPES.format(folder)}";' for folder in PANELS.values()]
    lines += [PLAIN, f"export const dashboard: Plain<Dashboard> = {json.dumps(dashboard, indent=1)};"]
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            continue
        folder, number = PANELS[panel["type"]], panel["id"]
        lines.append(f"export const options{number}: Plain<{folder}.Options> = {json.dumps(panel['options'])};")
        custom = panel["fieldConfig"]["defaults"].get("custom")
        if custom is not None:
            lines.append(f"export const field{number}: Plain<{folder}.FieldConfig> = {json.dumps(custom)};")
    return "\n".join(lines) + "\n"


def main() -> int:
    npm = shutil.which("npm")
    if npm is None:
        print("npm is not installed: https://nodejs.org", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="macpipe-dashboard-") as name:
        folder = Path(name)
        install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", *PACKAGES]
        subprocess.run(install, cwd=folder, check=True, timeout=INSTALL_S)
        program = folder / "dashboard.ts"
        program.write_text(as_typescript(json.loads(DASHBOARD.read_text(encoding="utf-8"))), encoding="utf-8")
        tsc = ["node_modules/.bin/tsc", "--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", program.name]
        done = subprocess.run(tsc, cwd=folder, check=False, timeout=COMPILE_S)
    print(f"{DASHBOARD.name}: {'as' if done.returncode == 0 else 'NOT as'} {' and '.join(PACKAGES)} check it")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
