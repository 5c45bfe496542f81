// Nullspace: five small conveniences. Every page works without this file.
// 1. Live parts: #live holds sections marked data-part. When the job's event stream speaks (or,
//    without a stream, every few seconds) the page's fragment is fetched and changed parts replaced.
// 2. Faults beside the field that the browser found by the HTML constraints.
// 3. What the chosen methods make of the budget of trials, while they are chosen.
// 4. Fields that the chosen kind of job has no use for are made valid; the style sheet hides them.
// 5. A copy button on code.
"use strict";

const live = document.getElementById("live");
const GAP = 1000; // at most one fetch a second
const POLL = 3000; // without a stream
let source = null;
let fetchedAt = 0;
let waiting = null;
let over = false;

function partUrl() {
  return live.dataset.partUrl || location.href.split("#")[0];
}

async function refresh() {
  waiting = null;
  fetchedAt = Date.now();
  try {
    const answer = await fetch(partUrl(), { headers: { Accept: "text/html" } });
    if (answer.redirected && new URL(answer.url).pathname === "/signin") {
      location.reload();
      return;
    }
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const fresh of page.querySelectorAll("[data-part]")) replace(fresh);
  } catch {
    // The server is away; the stream or the timer tries again.
  }
}

function replace(fresh) {
  const old = live.querySelector(`[data-part="${CSS.escape(fresh.dataset.part)}"]`);
  if (!old) {
    place(fresh);
    return;
  }
  const opened = new Map();
  for (const each of [old, ...old.querySelectorAll("details")])
    if (each.localName === "details") opened.set(each.dataset.keep || each.querySelector("summary")?.textContent, each.open);
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  // Somebody is typing or has opened a menu here: leave it until the next time.
  if (focused && focused.matches("input, textarea, select")) return;
  if (old.querySelector("textarea, input:not([type=hidden])") && dirty(old)) return;
  const next = document.importNode(fresh, true);
  for (const each of [next, ...next.querySelectorAll("details")])
    if (each.localName === "details") {
      const key = each.dataset.keep || each.querySelector("summary")?.textContent;
      if (opened.has(key)) each.open = opened.get(key);
    }
  if (next.outerHTML === old.outerHTML) return;
  const said = old.dataset.announce;
  const scrolled = [...old.querySelectorAll("[data-scroll]")].map((each) => [each.dataset.scroll, each.scrollTop, atEnd(each)]);
  old.replaceWith(next);
  for (const [name, top, end] of scrolled) {
    const box = next.querySelector(`[data-scroll="${CSS.escape(name)}"]`);
    if (box) box.scrollTop = "end" in box.dataset && end ? box.scrollHeight : top;
  }
  if (focused) refocus(next, focused);
  if (next.dataset.announce && next.dataset.announce !== said) announce(next.dataset.announce);
}

function place(fresh) {
  // A part that was not there before (the first result): put it after the part that precedes it.
  let before = fresh.previousElementSibling;
  while (before && !before.dataset.part) before = before.previousElementSibling;
  const anchor = before && live.querySelector(`[data-part="${CSS.escape(before.dataset.part)}"]`);
  if (anchor) anchor.after(document.importNode(fresh, true));
}

function dirty(part) {
  for (const each of part.querySelectorAll("input:not([type=hidden]), textarea")) {
    if (each.type === "checkbox" || each.type === "radio") {
      if (each.checked !== each.defaultChecked) return true;
    } else if (each.value !== each.defaultValue) return true;
  }
  return false;
}

function atEnd(box) {
  return box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
}

function refocus(part, lost) {
  const link = lost.getAttribute("href");
  const tries = [
    lost.id && `#${CSS.escape(lost.id)}`,
    link && `${lost.localName}[href="${CSS.escape(link)}"]`,
    lost.dataset.scroll && `[data-scroll="${CSS.escape(lost.dataset.scroll)}"]`,
    lost.localName === "summary" && "summary",
    lost.localName === "button" && "button",
  ];
  for (const each of tries) {
    const found = each && part.querySelector(each);
    if (found) {
      found.focus({ preventScroll: true });
      return;
    }
  }
}

function announce(text) {
  const box = document.getElementById("announce");
  if (box) box.textContent = text;
}

function soon() {
  if (waiting === null) waiting = setTimeout(refresh, Math.max(0, fetchedAt + GAP - Date.now()));
}

function listen() {
  source = new EventSource(live.dataset.events);
  const heard = (event) => {
    if (event.lastEventId) {
      // A new stream (after the server's limit of ten minutes) goes on from here.
      live.dataset.events = live.dataset.events.replace(/after=\d+/, `after=${event.lastEventId}`);
    }
    soon();
  };
  for (const kind of ["message", "job", "task", "trial", "progress", "artifact", "chat", "log"])
    source.addEventListener(kind, heard);
  source.addEventListener("end", () => {
    source.close();
    over = true;
    document.documentElement.dataset.live = "over";
    soon();
  });
  source.addEventListener("open", () => {
    document.documentElement.dataset.live = "stream";
  });
  source.addEventListener("error", () => {
    document.documentElement.dataset.live = "poll";
    if (source.readyState === EventSource.CLOSED && !over) setTimeout(listen, 15000);
  });
}

if (live) {
  for (const box of document.querySelectorAll("[data-end]")) box.scrollTop = box.scrollHeight;
  if (live.dataset.events && "EventSource" in window) {
    listen();
    setInterval(() => {
      if (over || document.hidden) return;
      if (source.readyState !== EventSource.OPEN) soon();
    }, POLL);
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden && !over) soon();
    });
  } else if (live.dataset.poll || live.dataset.events) {
    document.documentElement.dataset.live = "poll";
    setInterval(() => {
      if (!document.hidden) soon();
    }, Number(live.dataset.poll) || POLL);
  }
}

// --- faults beside the field ---------------------------------------------------------------

function show(field) {
  const box = document.getElementById(`${field.id}-error`);
  if (!box) return;
  const message = field.validity.valid ? "" : field.validity.patternMismatch && field.title ? `${field.title}.` : field.validationMessage;
  box.textContent = message;
  box.hidden = !message;
  field.closest(".field")?.classList.toggle("bad", Boolean(message));
  if (message) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

document.addEventListener("invalid", (event) => {
  show(event.target);
  event.target.closest("details")?.setAttribute("open", "");
}, true);
document.addEventListener("change", (event) => {
  if (event.target.matches("input, select, textarea")) show(event.target);
});
document.querySelector(".alert[tabindex]")?.focus();
for (const link of document.querySelectorAll(".alert a[href^='#']"))
  link.addEventListener("click", () => document.getElementById(link.hash.slice(1))?.focus());

// --- the budget of the methods (the same words as web/routes/submit.py) ---------------------

const shares = document.getElementById("shares");

function budgetWords() {
  const chosen = [...document.querySelectorAll("input[name=methods]:checked")];
  const text = document.getElementById("trials").value.trim();
  if (!chosen.length || !/^\d{1,5}$/.test(text)) return "";
  const fixed = chosen.filter((box) => box.dataset.kind === "fixed");
  const searched = chosen.filter((box) => box.dataset.kind !== "fixed");
  const whole = searched.length ? Math.max(Number(text), chosen.length) : chosen.length;
  if (chosen.length === 1) return `${whole} trial${whole > 1 ? "s" : ""}.`;
  const left = whole - fixed.length;
  const share = (box) =>
    fixed.includes(box) ? 1 : Math.floor(left / searched.length) + (searched.indexOf(box) < left % searched.length ? 1 : 0);
  const words = chosen.map((box) => `${document.querySelector(`label[for="${box.id}"]`).textContent} ${share(box)}`);
  return `${whole} trials: ${words.join(", ")}.`;
}

if (shares)
  shares.closest("form").addEventListener("input", () => {
    const words = budgetWords();
    if (words !== shares.textContent) shares.textContent = words;
  });

// --- the kind of a job: what it has no use for must not keep the form from being sent --------

for (const choice of document.querySelectorAll("input[name=kind]"))
  choice.addEventListener("change", () => {
    for (const part of choice.form.querySelectorAll(`[data-kinds]:not([data-kinds~="${choice.value}"])`))
      for (const each of part.querySelectorAll("input, textarea")) {
        if (each.checkValidity()) continue;
        each.value = each.defaultValue;
        show(each);
      }
  });

// --- copy -----------------------------------------------------------------------------------

if (navigator.clipboard)
  for (const code of document.querySelectorAll("pre[data-copy]")) {
    const box = document.createElement("div");
    box.className = "copy-box";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
    code.replaceWith(box);
    box.append(code, button);
  }
