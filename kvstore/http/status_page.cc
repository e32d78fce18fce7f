// The page of `/`. Colours are those of Okabe and Ito, which colour-blind people tell apart; none
// of them says anything that a word beside it does not say too.
#include "kvstore/http/status_report.h"

namespace certkv {

const char* status_page() {
  return R"page(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>certkv</title>
<link rel="icon" href="data:,">
<style>
:root {
  color-scheme: light dark;
  --ground: #ffffff; --panel: #f4f6f8; --text: #16191d; --quiet: #555d66; --line: #d5dae0;
  --blue: #0072b2; --orange: #b26a00; --green: #00795a; --red: #b84700; --sky: #56b4e9; --track: #dde3e9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --panel: #1d2126; --text: #eceff2; --quiet: #a6afb8; --line: #353c44;
    --blue: #56b4e9; --orange: #e69f00; --green: #2fc79a; --red: #ff8a3d; --sky: #0072b2; --track: #333b44;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 40px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 16px; margin-bottom: 16px; }
h1 { font-size: 22px; margin: 0; }
h2 { font-size: 14px; margin: 0 0 10px; color: var(--quiet); font-weight: 600; }
.quiet { color: var(--quiet); }
.badge { border: 1.5px solid currentColor; border-radius: 4px; padding: 0 8px; font-weight: 600; white-space: nowrap; }
.good { color: var(--green); } .warn { color: var(--orange); } .bad { color: var(--red); }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; min-width: 0; }
section.wide { grid-column: 1 / -1; overflow-x: auto; }
.big { font-size: 26px; font-weight: 650; font-variant-numeric: tabular-nums; }
.figures { display: flex; flex-wrap: wrap; gap: 8px 26px; }
.figures div span { display: block; color: var(--quiet); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--quiet); font-size: 13px; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; }
.row { display: grid; grid-template-columns: 90px 1fr 150px; gap: 10px; align-items: center; margin: 5px 0; }
#bound-rows .row { grid-template-columns: 90px 1fr 64px; }
.row .value { text-align: right; font-variant-numeric: tabular-nums; }
.track { background: var(--track); border-radius: 3px; height: 12px; position: relative; }
.fill { background: var(--blue); border-radius: 3px; height: 100%; min-width: 0; }
.mark { position: absolute; top: -4px; bottom: -4px; width: 2px; background: var(--text); }
svg { display: block; width: 100%; height: 56px; margin-top: 8px; }
polyline { fill: none; stroke: var(--blue); stroke-width: 2; vector-effect: non-scaling-stroke; }
[hidden] { display: none !important; }
</style>
</head>
<body>
<main>
<header>
  <h1>certkv <span id="role"></span></h1>
  <span id="name" class="quiet"></span>
  <span id="ready" class="badge quiet" role="status">waiting</span>
  <span id="uptime" class="quiet"></span>
  <span id="age" class="bad" role="alert"></span>
</header>
<div class="grid">
  <section id="job" hidden><h2>Job</h2><div class="figures" id="job-figures"></div>
    <svg id="rate" viewBox="0 0 119 40" preserveAspectRatio="none" role="img" aria-label="tokens per second, last two minutes"><polyline points=""></polyline></svg>
    <div class="quiet">tokens per second, last two minutes</div></section>
  <section id="bounds" hidden><h2>Relative error bounds, last step</h2><div id="bound-rows"></div>
    <div class="quiet" id="bound-note"></div></section>
  <section id="rungs" hidden><h2>Rungs and outcomes, head-steps</h2><div id="rung-rows"></div>
    <div class="figures" id="outcomes"></div></section>
  <section id="memory" hidden><h2>Memory</h2><div id="memory-rows"></div></section>
  <section id="lag" hidden><h2>Replication</h2><div class="figures" id="lag-figures"></div>
    <svg id="lag-line" viewBox="0 0 119 40" preserveAspectRatio="none" role="img" aria-label="lag in bytes, last two minutes"><polyline points=""></polyline></svg>
    <div class="quiet">lag, last two minutes</div></section>
  <section id="nodes" class="wide" hidden><h2>Nodes</h2><table><thead><tr><th>node</th><th>state</th><th>view</th>
    <th class="number">lag</th><th class="number">free</th><th class="number">silent</th><th>address</th></tr></thead>
    <tbody id="node-rows"></tbody></table></section>
  <section id="counters" hidden><h2>Counters</h2><table><tbody id="counter-rows"></tbody></table></section>
</div>
<p class="quiet">Also here: <code>/healthz</code> <code>/readyz</code> <code>/metrics</code> <code>/v1/status</code></p>
</main>
<script>
"use strict";
const $ = id => document.getElementById(id);
const make = (tag, text, css) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (css) e.className = css;
  return e;
};
const bytes = b => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let i = 0;
  while (b >= 1024 && i + 1 < units.length) { b /= 1024; ++i; }
  return (i === 0 || b >= 100 ? b.toFixed(0) : b.toFixed(1)) + " " + units[i];
};
const count = n => String(n).replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
const short = x => typeof x === "string" ? x : x === 0 ? "0" : x.toPrecision(3);
const span = s => {
  s = Math.floor(s);
  const two = n => String(n).padStart(2, "0");
  return Math.floor(s / 3600) + ":" + two(Math.floor(s / 60) % 60) + ":" + two(s % 60);
};
const figures = (box, list) => box.replaceChildren(...list.map(([label, value, css]) => {
  const d = make("div");
  d.append(make("span", label), make("b", value, "big" + (css ? " " + css : "")));
  return d;
}));
const bar = (label, share, value, mark) => {
  const row = make("div", undefined, "row"), track = make("div", undefined, "track"), fill = make("div", undefined, "fill");
  fill.style.width = Math.max(0, Math.min(1, share || 0)) * 100 + "%";
  track.append(fill);
  if (mark !== undefined) {
    const m = make("div", undefined, "mark");
    m.style.left = Math.max(0, Math.min(1, mark)) * 100 + "%";
    track.append(m);
  }
  row.append(make("div", label), track, make("div", value, "value"));
  return row;
};
const history = {};
const line = (id, value) => {
  const h = history[id] = (history[id] || []).concat(value).slice(-120);
  const top = Math.max(1e-9, ...h);
  $(id).firstElementChild.setAttribute("points", h.map((v, i) => (120 - h.length + i) + "," + (38 - 36 * v / top)).join(" "));
};
function show(s) {
  $("role").textContent = s.role;
  document.title = "certkv " + s.role + " " + s.name;
  $("name").textContent = s.name + ", version " + s.version;
  $("uptime").textContent = "up " + span(s.uptime_seconds);
  $("ready").textContent = s.ready ? "\u2713 ready" : "\u2717 not ready: " + s.reason;
  $("ready").className = "badge " + (s.ready ? "good" : "bad");
  $("memory").hidden = s.memory.length === 0;
  $("memory-rows").replaceChildren(...s.memory.map(m =>
    bar(m.name, m.used_bytes / m.total_bytes, bytes(m.used_bytes) + " of " + bytes(m.total_bytes))));
  const j = s.job;
  for (const id of ["job", "bounds", "rungs"]) $(id).hidden = !j;
  if (j) {
    figures($("job-figures"), [
      ["requests", count(j.finished) + " / " + count(j.lines)], ["running", count(j.running)], ["waiting", count(j.waiting)],
      ["failed", count(j.failed), j.failed ? "bad" : ""], ["steps", count(j.steps)], ["tokens", count(j.generation_tokens)],
      ["tokens/s", short(j.tokens_per_second)]].concat(j.prefill_share >= 0 ? [["prefill", Math.round(100 * j.prefill_share) + " %"]] : []));
    line("rate", typeof j.tokens_per_second === "number" ? j.tokens_per_second : 0);
    const b = j.relative_bound, relative = j.tolerance.kind === "relative";
    const known = [b.p50, b.p95, b.p99, b.max, b.worst, relative ? j.tolerance.value : 0].filter(x => typeof x === "number");
    const scale = 1.1 * Math.max(1e-12, ...known), mark = relative && typeof j.tolerance.value === "number" ? j.tolerance.value / scale : undefined;
    $("bound-rows").replaceChildren(...[["median", b.p50], ["95 %", b.p95], ["99 %", b.p99], ["largest", b.max], ["worst so far", b.worst]].map(
      ([label, x]) => bar(label, typeof x === "number" ? x / scale : 1, short(x), mark)));
    $("bound-note").textContent = "tolerance " + short(j.tolerance.value) + (relative ? " of S (the upright line)" : " absolute");
    const all = j.rungs.reduce((a, x) => a + x, 0);
    $("rung-rows").replaceChildren(...j.rungs.map((x, r) =>
      bar("rung " + r, all ? x / all : 0, count(x) + (all ? " (" + (100 * x / all).toFixed(1) + " %)" : ""))));
    const o = j.outcomes;
    figures($("outcomes"), [["certified", count(o.certified)], ["exact", count(o.exact)],
      ["over", count(o.over), o.over ? "warn" : ""], ["failed", count(o.failed), o.failed ? "bad" : ""],
      ["canaries failed", count(j.canary_failures), j.canary_failures ? "bad" : ""],
      ["digests failed", count(j.digest_failures), j.digest_failures ? "bad" : ""]]);
  }
  const c = s.cluster;
  for (const id of ["nodes", "lag"]) $(id).hidden = !c;
  if (c) {
    figures($("lag-figures"), [["lag", bytes(c.lag_bytes) + (c.lag_limit_bytes ? " of " + bytes(c.lag_limit_bytes) : "")],
      ["runs to copy", count(c.open_runs)], ["view", count(c.view)],
      ["this node", c.active ? "\u2713 active" : "\u2717 fenced", c.active ? "good" : "bad"]]);
    line("lag-line", c.lag_bytes);
    $("node-rows").replaceChildren(...c.nodes.map(n => {
      const row = make("tr");
      const state = !n.alive ? ["\u2717 silent", "bad"] : !n.member ? ["\u25cb outside", "warn"] : ["\u2713 member", "good"];
      row.append(make("td", n.name + (n.self ? " (this)" : "")), make("td", state[0], state[1]), make("td", count(n.view)),
        make("td", bytes(n.lag_bytes), "number"), make("td", bytes(n.free_bytes), "number"),
        make("td", n.silent_seconds < 0 ? "never heard" : n.silent_seconds.toFixed(1) + " s", "number"), make("td", n.address));
      return row;
    }));
  }
  const others = Object.entries(s.counters);
  $("counters").hidden = others.length === 0;
  $("counter-rows").replaceChildren(...others.map(([name, value]) => {
    const row = make("tr");
    row.append(make("td", name.replaceAll("_", " ")), make("td", count(value), "number"));
    return row;
  }));
}
let heard = Date.now();
async function ask() {
  try {
    const answer = await fetch("v1/status", {cache: "no-store", signal: AbortSignal.timeout(5000)});
    if (!answer.ok) throw new Error("status " + answer.status);
    show(await answer.json());
    heard = Date.now();
    $("age").textContent = "";
  } catch (error) {
    $("age").textContent = "\u26a0 no answer for " + span((Date.now() - heard) / 1000) + ": what is shown is old";
  }
  setTimeout(ask, 1000);
}
ask();
</script>
</body>
</html>
)page";
}

}  // namespace certkv
