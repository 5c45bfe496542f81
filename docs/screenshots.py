"""Take the pictures of the documentation from a running server.

    NULLSPACE_URL=… NULLSPACE_TOKEN=… python docs/screenshots.py JOB [--trial N] [--live JOB]

JOB is a finished job, LIVE_JOB one that is searching. Every page is taken at phone and desktop
width into docs/: form, live, job, trial, analysis. CHROMIUM names a browser off the PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import httpx
from playwright.sync_api import Browser, sync_playwright

HERE = Path(__file__).parent
SIZES = {"phone": (390, 1700), "desktop": (1440, 1330)}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def best_trial(url: str, token: str, job: str) -> int:
    """The number of the front's trial with the fewest refusals."""
    answer = httpx.get(
        f"{url}/api/v1/jobs/{job}/front", headers={"Authorization": f"Bearer {token}"}
    ).raise_for_status()
    found = answer.json()
    rows = found["items"] if isinstance(found, dict) else found
    return int(rows[0]["number"])


def take(browser: Browser, url: str, token: str, pages: dict[str, str], scheme: str) -> None:
    """One picture of each page at each width; the colour scheme is `light` or `dark`."""
    for label, (width, height) in SIZES.items():
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        page = context.new_page()
        page.goto(f"{url}/signin")
        page.click("summary")
        page.fill("input[name=token]", token)
        page.locator("form:has(input[name=token]) button").click()
        page.wait_for_url(f"{url}/")
        for name, path in pages.items():
            page.goto(url + path)
            page.wait_for_load_state("load")
            suffix = "-dark" if scheme == "dark" else ""
            page.screenshot(path=HERE / f"{name}-{label}{suffix}.png")
        context.close()


def main() -> None:
    """Parse the arguments and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job")
    parser.add_argument("--live")
    parser.add_argument("--trial", type=int, help="default: the front's first")
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    arguments = parser.parse_args()
    url, token = os.environ["NULLSPACE_URL"].rstrip("/"), os.environ["NULLSPACE_TOKEN"]
    number = arguments.trial
    if number is None:
        number = best_trial(url, token, arguments.job)
    pages = {
        "form": "/jobs/new",
        "job": f"/jobs/{arguments.job}",
        "trial": f"/jobs/{arguments.job}/trials/{number}",
        "analysis": f"/jobs/{arguments.job}/geometry",
    }
    if arguments.live:
        pages["live"] = f"/jobs/{arguments.live}"
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        take(browser, url, token, pages, arguments.scheme)
        browser.close()


if __name__ == "__main__":
    main()
