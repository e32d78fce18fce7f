#!/usr/bin/env python3
"""The status page in headless Chromium: status_page_test.py STATUS_DEMO [FOLDER_FOR_SCREENSHOTS].

Ends with 77, which ctest lists as skipped, and the reason where no Chromium is found.
"""

import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

DEMO = sys.argv[1] if len(sys.argv) > 1 else ""
SHOTS = sys.argv[2] if len(sys.argv) > 2 else ""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((b for b in map(shutil.which, BROWSERS) if b), None)
LIMIT = 100


class Page(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = subprocess.Popen([DEMO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        cls.url = cls.server.stdout.readline().strip()
        cls.folder = tempfile.mkdtemp()

    @classmethod
    def tearDownClass(cls):
        cls.server.stdin.close()
        cls.server.wait(timeout=20)
        cls.server.stdout.close()
        shutil.rmtree(cls.folder, ignore_errors=True)

    def browse(self, *options):
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   "--no-first-run", "--disable-extensions", "--hide-scrollbars",
                   f"--user-data-dir={self.folder}/profile", "--virtual-time-budget=2500",
                   "--window-size=1100,1150", *options, self.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        return done.stdout

    def test_shows_every_figure_and_takes_no_name_for_markup(self):
        dom = self.browse("--dump-dom")
        text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", dom.split("<script>")[0])))
        for wanted in ("job", "rank 0 of 4, version 1.2.3", "up 1:02:05", "✓ ready", "123 / 500",
                       "3.0 GiB of 8.0 GiB", "1.5 GiB of 4.0 GiB", "365 421", "41.3", "38 %",
                       "0.0101", "0.0311", "0.0402", "0.0451", "0.0487", "tolerance 0.0500",
                       "rung 4", "8 500 000 (93.7 %)", "9 000 001", "70 002", "5.0 MiB of 64.0 MiB",
                       "✓ active", "alpha (this)", "✓ member", "○ outside", "✗ silent", "never heard",
                       "10.0.0.2:7400", "blocks served", "271 828"):
            self.assertIn(wanted, text.replace("\u202f", " "))
        self.assertIn("&lt;b&gt;delta&lt;/b&gt;", dom)
        self.assertNotIn("<b>delta</b>", dom)
        self.assertNotRegex(dom, r"(?:src|href)=\"(?!data:)", "it refers to something outside itself")

    def test_can_be_drawn_light_and_dark(self):
        pictures = {}
        for name, options in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
            path = os.path.join(SHOTS or self.folder, f"status-{name}.png")
            self.browse(f"--screenshot={path}", *options)
            with open(path, "rb") as file:
                pictures[name] = file.read()
            self.assertTrue(pictures[name].startswith(b"\x89PNG"))
            self.assertGreater(len(pictures[name]), 10_000, "there is hardly anything on it")
        self.assertNotEqual(pictures["light"], pictures["dark"])


if __name__ == "__main__":
    if BROWSER is None:
        print("skipped: there is no Chromium on PATH (Debian package chromium)")
        sys.exit(77)
    unittest.main(argv=sys.argv[:1], verbosity=2)
