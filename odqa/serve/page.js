"use strict";
// The page of odqa serve. Texts from outside become text nodes, never markup; see odqa/serve/page.py.

const SHOWN = 8; // passages that are shown at once, and candidates of a pass
const at = (id) => document.getElementById(id);
const parts = Object.fromEntries(["form", "question", "go", "stop", "key", "error", "status", "result", "answer",
  "confidence", "verdict", "right", "wrong", "kept", "evidence", "passes", "about"].map((id) => [id, at(id)]));
let running = null; // the AbortController of the question that is being answered
let asked = null; // the number of the answer that is shown

// --- making elements ---

/** Control and private characters, and those that turn the direction of text, as blanks; one for one. */
const visible = (text) => String(text).replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069\ue000-\uf8ff]/g, " ");

function el(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") made.className = value;
    else if (value !== null) made.setAttribute(name, value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) made.append(child instanceof Node ? child : visible(child));
  }
  return made;
}

/** A text with spans marked. Places count Unicode characters, as Python does. */
function marked(text, spans) {
  const characters = Array.from(text);
  const pieces = [];
  let done = 0;
  for (const [start, end] of [...spans].sort((a, b) => a[0] - b[0] || b[1] - a[1])) {
    if (end <= done) continue;
    const from = Math.max(start, done);
    pieces.push(characters.slice(done, from).join(""), el("mark", {}, characters.slice(from, end).join("")));
    done = end;
  }
  return [...pieces, characters.slice(done).join("")];
}

const time = (seconds) => seconds === null ? "not run" : seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(2)} s`;
const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
const number = (value) => value === null ? "-" : Number(value.toPrecision(4)).toString();

function sureness(answer) {
  if (typeof answer.confidence === "number") return `confidence ${answer.confidence.toFixed(2)}`;
  if (answer.score === null) return "confidence unknown";
  return answer.score <= 0 ? `confidence ${Math.exp(answer.score).toFixed(2)}, uncalibrated` : `score ${number(answer.score)}`;
}

// --- showing what has happened ---

function showAnswer(answer, isLast) {
  const text = answer.text || "No answer: the passages do not say, or the reader is not sure enough.";
  parts.answer.className = (answer.text ? "" : "nothing") + (isLast ? "" : " waits");
  parts.answer.replaceChildren(visible(text));
  const best = answer.text ? null : answer.candidates.find((one) => one.text);
  parts.confidence.replaceChildren(visible(sureness(answer) + (best ? `; its best candidate is: ${best.text}` : "")));
}

function passage(one, isRead) {
  const found = one.found ? [el("span", { class: "badge here" }, "taken from here")] : [];
  const facts = [`passage ${one.id}`];
  if (one.tokens !== null && one.tokens !== undefined) facts.push(count(one.tokens, "token"));
  if (one.score !== null) facts.push(`score ${number(one.score)}${one.source ? ` by ${one.source}` : ""}`);
  return el("li", {},
    el("b", {}, one.title || "(no title)"), found, " ", el("span", { class: "facts" }, facts.join(", ")),
    el("p", {}, isRead ? marked(one.text, one.marks) : one.text));
}

/** The packed passages, what each costs, and what was left out. `told` is a step of packing or reading. */
function showEvidence(told, packing) {
  const list = told.evidence || told.passages || [];
  const isRead = Boolean(told.evidence);
  const tokens = told.tokens ?? packing?.notes.tokens ?? 0;
  const budget = told.budget ?? packing?.notes.budget ?? 0;
  const spent = list.reduce((sum, one) => sum + (one.tokens || 0), 0);
  const bar = el("div", { class: "spent", role: "img", "aria-label": `${tokens} of ${budget} tokens` });
  for (const [share, kind, name] of [...list.map((one) => [one.tokens || 0, "", one.title]), [Math.max(0, tokens - spent), "frame", "question and prompt"]]) {
    const cell = el("span", { class: kind, title: visible(`${name}: ${count(share, "token")}`) });
    cell.style.width = `${100 * share / Math.max(1, budget)}%`;
    bar.append(cell);
  }
  const facts = [`${count(list.length, "passage")} packed, ${tokens.toLocaleString("en")} of ${budget.toLocaleString("en")} tokens`];
  if (tokens > spent) facts.push(`${count(tokens - spent, "token")} of them for question and prompt`);
  const dropped = Object.entries(packing?.notes.dropped || {}).map(([reason, ids]) => `${ids.length} (${reason})`);
  if (dropped.length) facts.push(`not packed: ${dropped.join(", ")}`);
  const open = list.slice(0, SHOWN).map((one) => passage(one, isRead));
  const rest = list.slice(SHOWN).map((one) => passage(one, isRead));
  const more = rest.length ? el("details", {}, el("summary", {}, `${rest.length} more`), el("ol", { class: "passages", start: SHOWN + 1 }, rest)) : null;
  parts.evidence.replaceChildren(el("p", { class: "note" }, facts.join("; ") + "."), bar,
    list.length ? el("ol", { class: "passages" }, open) : el("p", {}, "No passage: the reader saw the question alone."));
  if (more) parts.evidence.append(more);
}

function times(steps) {
  const most = Math.max(...steps.map((step) => step.seconds || 0), 1e-9);
  const rows = steps.map((step) => {
    const bar = el("span", { class: "time" });
    bar.style.width = `${100 * (step.seconds || 0) / most}%`;
    return el("tr", {}, el("th", { scope: "row" }, step.stage), el("td", {}, time(step.seconds)), el("td", { class: "bar-cell" }, bar));
  });
  const head = el("tr", {}, el("th", { scope: "col" }, "stage"), el("th", { scope: "col" }, "time"), el("td", {}));
  return el("table", { class: "times" }, el("thead", {}, head), el("tbody", {}, rows));
}

function ranking(step) {
  const rows = step.passages.map((one) => el("li", {}, one.title || one.id, " ", el("span", { class: "facts" }, `${one.id}, ${number(one.score)}${one.source ? ` by ${one.source}` : ""}`)));
  return el("details", {}, el("summary", {}, `${step.stage}: ${count(step.count, "passage")}, the first ${rows.length}`), el("ol", { class: "ranking" }, rows));
}

function reasons(step) {
  const rows = ["decision", "why", "query", "confidence", "below"].filter((key) => key in step.notes)
    .map((key) => el("li", {}, `${key}: ${typeof step.notes[key] === "number" ? number(step.notes[key]) : step.notes[key]}`));
  return el("ul", { class: "plain" }, rows);
}

/** One pass: why it was made, what it found, what was packed that was new, what it said. */
function pass(no, steps, seen, before) {
  const reading = steps.find((step) => step.answer);
  const inner = [];
  for (const step of steps) {
    if (step.stage === "recurse") inner.push(el("h3", {}, "Why"), reasons(step));
    else if (step.passages && step.stage !== "pack") inner.push(ranking(step));
  }
  if (reading) {
    const fresh = reading.evidence.filter((one) => !seen.has(one.id));
    const told = no === 1 ? count(fresh.length, "passage") : fresh.length ? fresh.map((one) => one.title || one.id).join(", ") : "nothing new";
    inner.push(el("p", {}, `Read: ${told}; ${reading.tokens} tokens.`));
    const candidates = reading.answer.candidates.slice(0, SHOWN);
    if (candidates.length > 1) {
      const rows = candidates.map((one) => el("li", {}, one.text || "(no answer)", " ", el("span", { class: "facts" }, one.logprob === null ? "" : Math.exp(one.logprob).toFixed(3))));
      inner.push(el("details", {}, el("summary", {}, `candidates: ${candidates.length}`), el("ol", { class: "ranking" }, rows)));
    }
    const dismissed = reading.notes["not kept"];
    if (dismissed) inner.push(el("p", {}, `This pass said "${dismissed.text || "(no answer)"}" and was less sure: the answer before it stands.`));
    for (const one of reading.evidence) seen.add(one.id);
  }
  inner.push(times(steps));
  const said = reading ? reading.answer.text || "(no answer)" : "no further pass";
  const changed = reading && before !== null ? (said === before ? ", unchanged" : `, was ${before}`) : "";
  const summary = el("summary", {}, `Pass ${no}: `, el("b", {}, said), reading ? ` (${sureness(reading.answer)}${changed})` : "");
  return [el("details", { class: "pass" }, summary, el("div", { class: "inner" }, inner)), reading ? said : before];
}

function showPasses(steps) {
  const passes = new Map();
  for (const step of steps) passes.set(step.pass, [...(passes.get(step.pass) || []), step]);
  const seen = new Set();
  let before = null;
  const shown = [];
  for (const [no, own] of passes) {
    const [made, said] = pass(no, own, seen, before);
    made.open = passes.size <= 2;
    shown.push(made);
    before = said;
  }
  parts.passes.replaceChildren(...shown);
}

// --- asking ---

const headers = () => {
  const key = parts.key.value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function problem(response) {
  if (response.status === 401) {
    at("key-row").hidden = false;
    parts.key.focus();
  }
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message || `The server answered with status ${response.status}.`);
}

/** The objects of a stream of JSON lines, as they come. */
async function* lines(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const whole = rest.split("\n");
    rest = whole.pop();
    for (const line of whole) yield JSON.parse(line);
    if (done) return;
  }
}

function begin() {
  asked = null;
  parts.error.hidden = true;
  parts.verdict.hidden = true;
  parts.result.hidden = false;
  parts.result.setAttribute("aria-busy", "true");
  parts.answer.className = "waits";
  parts.answer.replaceChildren("...");
  for (const part of [parts.confidence, parts.evidence, parts.passes]) part.replaceChildren();
  for (const button of [parts.right, parts.wrong]) button.setAttribute("aria-pressed", "false");
  parts.kept.textContent = "A mark is kept on the server with question and answer.";
}

function show(told, steps) {
  const packing = [...steps].reverse().find((step) => step.stage === "pack");
  if (told.event === "begin") {
    parts.status.textContent = told.before ? `${count(told.before, "question")} before yours.` : "Looking for passages.";
    return false;
  }
  if (told.event === "error") throw new Error(told.error.message);
  if (told.event === "step") {
    steps.push(told);
    parts.status.textContent = `Pass ${told.pass}: ${told.stage} took ${time(told.seconds)}.`;
    if (told.stage === "pack") showEvidence(told, told);
    if (told.answer) { showAnswer(told.answer, false); showEvidence(told, packing); }
    showPasses(steps);
    return false;
  }
  asked = told.id;
  showAnswer(told.answer, true);
  showEvidence(told, packing);
  const passes = told.passes > 1 ? ` in ${told.passes} passes` : "";
  parts.status.textContent = `Answered in ${time(told.seconds)}${passes}${told.waited > 0.1 ? `, after waiting ${time(told.waited)}` : ""}.`;
  parts.verdict.hidden = false;
  return true;
}

async function ask() {
  const question = parts.question.value.trim();
  if (!question || running) return;
  running = new AbortController();
  parts.go.disabled = true;
  parts.stop.hidden = false;
  begin();
  const steps = [];
  try {
    const response = await fetch("/ask", { method: "POST", headers: headers(), signal: running.signal, body: JSON.stringify({ question, stream: "lines" }) });
    if (!response.ok) throw await problem(response);
    remember();
    let isWhole = false;
    for await (const told of lines(response)) isWhole = show(told, steps) || isWhole;
    if (!isWhole) throw new Error("The connection ended before the answer. Ask again.");
  } catch (error) {
    const isStopped = error.name === "AbortError";
    parts.status.textContent = isStopped ? "Stopped." : "";
    parts.error.hidden = isStopped;
    parts.error.textContent = isStopped ? "" : visible(error instanceof TypeError ? "The server cannot be reached. Is it running?" : error.message);
    parts.result.hidden = steps.length === 0;
    if (!asked) parts.answer.replaceChildren(isStopped ? "(stopped)" : "(no whole answer)");
  } finally {
    running = null;
    parts.go.disabled = false;
    parts.stop.hidden = true;
    parts.result.removeAttribute("aria-busy");
  }
}

async function mark(isRight) {
  const id = asked;
  if (!id) return;
  try {
    const response = await fetch(`/ask/${encodeURIComponent(id)}/mark`, { method: "POST", headers: headers(), body: JSON.stringify({ is_right: isRight }) });
    if (!response.ok) throw await problem(response);
    if (id !== asked) return;
    parts.right.setAttribute("aria-pressed", String(isRight));
    parts.wrong.setAttribute("aria-pressed", String(!isRight));
    parts.kept.textContent = `Kept: ${isRight ? "right" : "wrong"}. It can be changed.`;
  } catch (error) {
    parts.kept.textContent = visible(`Not kept: ${error.message}`);
  }
}

// --- the key, and what is asked here ---

function remember() {
  try { sessionStorage.setItem("odqa-key", parts.key.value.trim()); } catch { /* storage may be forbidden; then it is asked for again */ }
}

async function about() {
  try { parts.key.value = sessionStorage.getItem("odqa-key") || ""; } catch { /* as above */ }
  if (parts.key.value) at("key-row").hidden = false;
  try {
    const response = await fetch("/ask", { headers: headers() });
    if (!response.ok) throw await problem(response);
    const facts = await response.json();
    const from = facts.passages ? `from ${count(facts.passages, "passage")}` : "from the model alone";
    parts.about.textContent = visible(`The pipeline ${facts.recipe} answers ${from}, and shows what the answer is taken from.`);
    parts.question.maxLength = facts.question_characters;
  } catch (error) {
    parts.about.textContent = visible(error instanceof TypeError ? "The server cannot be reached." : error.message);
  }
}

parts.form.addEventListener("submit", (event) => { event.preventDefault(); ask(); });
parts.stop.addEventListener("click", () => running?.abort());
parts.right.addEventListener("click", () => mark(true));
parts.wrong.addEventListener("click", () => mark(false));
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
about();
