#!/usr/bin/env python3
"""Checks what the tree promises about itself: `check_tree.py [ROOT]`.

One line per finding, `path:line: what is wrong`; exit code 1 if there is any. The rules are the
functions named rule_*; tests/check_tree_test.py shows that each can fail.
"""

import ast
import os
import re
import subprocess
import sys

LAYERS = ["kernels/base", "kernels", "parallel", "kvstore", "runtime", "launcher"]
TOP_LEVEL = {
    "CMakeLists.txt", "CMakePresets.json", "README.md", "LICENSE", "kernels", "parallel", "kvstore",
    "runtime", "launcher", "configs", "tests", ".ci", ".git", ".gitignore", ".gitattributes",
    ".clang-format", ".clang-tidy", ".editorconfig",
}
CODE = (".cc", ".h", ".cu", ".cuh")
LIMITED = CODE + (".py", ".sh")
MAX_LINES = 600
TEXT = LIMITED + (".cmake", ".md", ".yaml", ".yml", "CMakeLists.txt", "CMakePresets.json")
# Data that others wrote or programs made: kept byte for byte.
DATA = ("tests/golden/", "launcher/demo/")

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', re.M)
NETWORK = re.compile(r"^(mpi\.h|nccl\.h|uc[pst]/.*)$")
# Written so that this file does not find itself.
MACHINE = [
    (re.compile(r"(?<![\w/.$}*-])/(wor[k]|home/[a-z]|roo[t]/|User[s]/)(?![\w-]*\()"),
     "a path of one machine"),
    (re.compile(r"\.\./share[d]/"), "a folder outside the repository"),
    (re.compile(r"https?://[\w.-]*(artifactor[y]|nexu[s]|registr[y]|mirro[r]|prox[y]|\.interna[l]|"
                r"\.cor[p]|\.la[n])\b"), "a package registry or an internal host"),
    (re.compile(r"\b[Ii]ssu[e] #?\d"), "the number of an issue"),
]
BYTES = "tests/fuzz/corpus/"  # inputs of fuzzers: no text, whatever they look like
ASSERTION = re.compile(r"\b(EXPECT_\w+|ASSERT_\w+|FAIL|ADD_FAILURE|ADD_FAILURE_AT|static_assert)\s*\(")
# A contract suite hands its cases over as functions; what they assert is checked where they stand.
CONTRACT = re.compile(r"\bGetParam\(\)\s*\.\s*check\s*\(")
CANNOT_FAIL = re.compile(r"\b(EXPECT|ASSERT)_(TRUE\(\s*true|FALSE\(\s*false)\s*\)")
TEST_CASE = re.compile(r"^(?:TEST|TEST_F|TEST_P|TYPED_TEST|TYPED_TEST_P)\(\s*(\w+),\s*(\w+)\)\s*\{",
                       re.M)
FUNCTION = re.compile(r"\b(\w+)\s*\([^;{}]*\)\s*(?:const\s*)?(?:noexcept\s*)?(?:->\s*[\w:<>]+\s*)?\{")
CALL = re.compile(r"\b(\w+)\s*(?:<[\w:, ]*>)?\s*[({]")
LITERAL_OR_COMMENT = re.compile(
    r"""//[^\n]*|/\*.*?\*/|\bR"(?P<d>\w*)\(.*?\)(?P=d)"|"(?:\\.|[^"\\\n])*"|(?<!\w)'(?:\\.|[^'\\\n])+'""",
    re.S)
NOT_FUNCTIONS = {"if", "for", "while", "switch", "catch", "return", "sizeof"}


class Tree:
    """The files of the tree with their text, read once."""

    def __init__(self, root):
        self.root = root
        self.findings = []
        tracked = self._git("--cached")
        listed = tracked and tracked + self._git("--others", "--exclude-standard")
        self.paths = sorted(set(listed or self._walk()))
        # A stray file of the user's is his own affair; one that was committed is not.
        self.top_level = sorted({p.split("/")[0] for p in tracked or self.paths})
        self.text = {}
        for path in self.paths:
            if path.startswith(BYTES):
                continue
            if path.endswith(TEXT) or "." not in os.path.basename(path):
                try:
                    with open(os.path.join(root, path), encoding="utf-8", newline="") as file:
                        self.text[path] = file.read()
                except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
                    pass  # binary, or deleted and not yet committed

    def _git(self, *what):
        command = ["git", "-C", self.root, "ls-files", "-z", *what]
        if not os.path.exists(os.path.join(self.root, ".git")):
            return []
        try:
            output = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return []  # no git, or a tree of another owner: walk instead
        return [p for p in output.decode("utf-8", "surrogateescape").split("\0") if p]

    def _walk(self):
        found = []
        for folder, folders, files in os.walk(self.root):
            inside = os.path.relpath(folder, self.root)
            folders[:] = [d for d in folders if d not in (".git", "__pycache__") and
                          not (inside == "." and re.match(r"(build(-.*)?|runs)$", d))]
            found += [os.path.normpath(os.path.join(inside, f)) for f in files]
        return found

    def code(self):
        return [(p, self.text[p]) for p in self.paths if p in self.text and p.endswith(CODE)]

    def report(self, path, position, what):
        line = self.text[path].count("\n", 0, position) + 1 if path in self.text else 1
        self.findings.append(f"{path}:{line}: {what}")


def layer_of(path):
    """0 for kernels/base ... 5 for launcher; None outside the layers."""
    for rank, layer in enumerate(LAYERS):
        if path.startswith(layer + "/"):
            return rank
    return None


def bare(text):
    """C++ with comments and literals blanked out, at the same positions."""
    def blank(match):
        return re.sub(r"[^\n]", " ", match.group())
    return LITERAL_OR_COMMENT.sub(blank, text)


def block_end(text, opening):
    """The position behind the brace that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    return len(text)


def rule_includes_go_one_way(tree):
    for path, text in tree.code():
        rank = layer_of(path)
        for match in INCLUDE.finditer(text):
            quote, target = match.groups()
            if quote == "<":
                continue
            target_rank = layer_of(target)
            if target_rank is None and not target.startswith("tests/"):
                tree.report(path, match.start(),
                            f'"{target}" is not written from the root of the repository')
            elif rank is not None and target_rank is None:
                tree.report(path, match.start(), f'the product includes "{target}" of the tests')
            elif rank is not None and target_rank > rank:
                tree.report(path, match.start(),
                            f'upward include: {LAYERS[rank]} may not use "{target}"')


def rule_libraries_stay_in_their_rooms(tree):
    for path, text in tree.code():
        network_room = path.startswith(("parallel/", "tests/parallel/", "tests/support/",
                                        "launcher/doctor"))
        asio_seen = path == "kernels/base/asio.h"
        for match in INCLUDE.finditer(text):
            target = match.group(2)
            if NETWORK.match(target) and not network_room:
                tree.report(path, match.start(), f"<{target}> belongs to parallel/ alone")
            if target == "kernels/base/asio.h":
                asio_seen = True
            elif re.match(r"boost/asio\b", target) and path != "kernels/base/asio.h":
                tree.report(path, match.start(), f'<{target}>: include "kernels/base/asio.h" instead')
            elif target.startswith("boost/beast") and not asio_seen:
                tree.report(path, match.start(), f'<{target}> needs "kernels/base/asio.h" before it')


def rule_the_verifier_stands_alone(tree):
    """What checks an audit shares nothing with what made it but the bytes of the file."""
    for path, text in tree.code():
        if not re.match(r"runtime/audit/(check|format|reader|requantise|verify)\.", path):
            continue
        for match in INCLUDE.finditer(text):
            target = match.group(2)
            shared = target.startswith("kernels/") and not (
                target.startswith("kernels/base/") or target == "kernels/simd.h")
            if shared or target.startswith(("runtime/certify/", "runtime/audit/log",
                                            "runtime/audit/capture")):
                tree.report(path, match.start(), f'the verifier may not use "{target}"')


def rule_files_are_short(tree):
    for path, text in tree.text.items():
        script = text.startswith("#!") and "." not in os.path.basename(path)
        lines = text.count("\n")
        if (path.endswith(LIMITED) or script) and lines > MAX_LINES:
            tree.report(path, 0, f"{lines} lines: at most {MAX_LINES}, split it by idea")


def rule_top_level_is_closed(tree):
    for name in tree.top_level:
        if name not in TOP_LEVEL:
            tree.findings.append(f"{name}:1: unexpected at the top level")


def rule_whitespace(tree):
    for path, text in tree.text.items():
        if path.startswith(DATA):
            continue
        for match in re.finditer(r"\t|\r|[ \t]+$", text, re.M):
            kind = {"\t": "tab", "\r": "carriage return"}.get(match.group()[0], "trailing whitespace")
            tree.report(path, match.start(), kind)
            break  # one per file says enough
        if text and not text.endswith("\n"):
            tree.report(path, len(text), "no newline at the end")


def rule_headers_have_a_guard(tree):
    for path, text in tree.code():
        if path.endswith((".h", ".cuh")) and not re.search(r"^#pragma once$", text, re.M):
            tree.report(path, 0, "#pragma once is missing")


def rule_no_machine_is_named(tree):
    for path, text in tree.text.items():
        if path.startswith(DATA) and not path.endswith((".md", ".py")):
            continue
        for pattern, what in MACHINE:
            for match in pattern.finditer(text):
                tree.report(path, match.start(), f"names {what}: {match.group()}")


def rule_tests_assert(tree):
    tests = {p: bare(t) for p, t in tree.code() if p.startswith("tests/")}
    bodies = {}  # helper functions: name -> bodies
    for text in tests.values():
        for match in FUNCTION.finditer(text):
            if match.group(1) not in NOT_FUNCTIONS:
                body = text[match.end() - 1:block_end(text, match.end() - 1)]
                bodies.setdefault(match.group(1), []).append(body)
    asserting = {n for n, found in bodies.items() if any(asserts(b, ()) for b in found)}
    while True:  # helpers that assert through helpers
        more = {n for n, found in bodies.items()
                if n not in asserting and any(asserts(b, asserting) for b in found)}
        if not more:
            break
        asserting |= more
    for path, text in tests.items():
        for match in TEST_CASE.finditer(text):
            body = text[match.end() - 1:block_end(text, match.end() - 1)]
            if not asserts(body, asserting):
                tree.report(path, match.start(),
                            f"{match.group(1)}.{match.group(2)} asserts nothing: it cannot fail")


def asserts(body, asserting):
    if ASSERTION.search(CANNOT_FAIL.sub("", body)) or CONTRACT.search(body):
        return True
    return any(m.group(1) in asserting for m in CALL.finditer(body)) if asserting else False


def rule_python_tests_assert(tree):
    for path, text in tree.text.items():
        if not (path.startswith("tests/") and path.endswith(".py")):
            continue
        try:
            module = ast.parse(text)
        except SyntaxError as error:
            tree.findings.append(f"{path}:{error.lineno}: {error.msg}")
            continue
        functions = [n for n in ast.walk(module) if isinstance(n, ast.FunctionDef)]
        asserting = set()
        while True:
            more = {f.name for f in functions if f.name not in asserting and
                    python_asserts(f, asserting)}
            if not more:
                break
            asserting |= more
        for function in functions:
            if function.name.startswith("test_") and function.name not in asserting:
                tree.findings.append(f"{path}:{function.lineno}: {function.name} asserts nothing: "
                                     "it cannot fail")


def python_asserts(function, asserting):
    for node in ast.walk(function):
        if isinstance(node, (ast.Assert, ast.Raise)):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.startswith(("assert", "expect")) or name == "fail" or name in asserting:
                return True
    return False


RULES = [rule for name, rule in sorted(globals().items()) if name.startswith("rule_")]


def check(root):
    tree = Tree(root)
    for rule in RULES:
        rule(tree)
    return sorted(tree.findings)


if __name__ == "__main__":
    top = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..")
    found = check(os.path.abspath(top))
    for finding in found:
        print(finding)
    print(f"check_tree: {len(found)} finding(s)" if found else "check_tree: clean")
    sys.exit(1 if found else 0)
