// The annotation page. Every text from the pairs is put in as text, never as markup.
"use strict";

const byId = (id) => document.getElementById(id);
const state = { name: "", pair: null, busy: true, image: 0, scale: 1, x: 0, y: 0 };
const SAID = { left: "left is better", right: "right is better", tie: "tie", "both bad": "both bad", skip: "skipped" };

async function ask(path, body) {
  let reply;
  try {
    reply = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error(
      "The server does not answer, and this was not saved. Start it again with accord annotate and open the address " +
        "that it prints. What was saved before is not lost."
    );
  }
  const data = await reply.json().catch(() => ({ error: `the server failed (${reply.status}); see what it says` }));
  if (!reply.ok) throw Object.assign(new Error(data.error), { status: reply.status });
  return data;
}

function setBusy(busy) {
  state.busy = busy;
  byId("judge").setAttribute("aria-busy", String(busy));
}

// One request at a time: a key that is pressed twice judges once.
async function change(path, body, said) {
  if (state.busy || !state.name) return;
  setBusy(true);
  try {
    const data = await ask(path, { annotator: state.name, ...body });
    byId("alert").textContent = "";
    byId("status").textContent = said;
    await show(data);
  } catch (error) {
    byId("status").textContent = "";
    byId("alert").textContent = error.message;
    if (error.status === 409) {
      const data = await ask("/api/next", { annotator: state.name }).catch(() => null);
      if (data) await show(data);
    }
  } finally {
    setBusy(false);
  }
}

const judge = (choice, reason = "") =>
  state.pair && change("/api/judge", { pair: state.pair.id, choice, reason }, `Saved: ${SAID[choice]}.`);
const undo = () => change("/api/undo", {}, "Taken back. Judge this pair again.");

function howLong(seconds) {
  if (seconds === null) return "";
  const minutes = Math.round(seconds / 60);
  if (minutes < 1) return ", less than a minute to go";
  if (minutes < 90) return `, about ${minutes} min to go`;
  return `, about ${(minutes / 60).toFixed(1)} h to go`;
}

async function show({ annotator, pair, progress }) {
  state.name = annotator;
  state.pair = pair;
  byId("who-name").textContent = annotator;
  byId("bar").max = Math.max(1, progress.done + progress.left);
  byId("bar").value = progress.done;
  byId("so-far").textContent = `${progress.done} judged, ${progress.left} left${progress.left ? howLong(progress.seconds_left) : ""}`;
  byId("pair").hidden = pair === null;
  byId("finished").hidden = pair !== null;
  for (const button of document.querySelectorAll(".choices button")) {
    if (button.id !== "undo") button.hidden = pair === null;
  }
  window.scrollTo(0, 0);
  if (pair === null) return;
  const turns = pair.turns.map((turn, n) => {
    const text = document.createElement("p");
    text.className = n === pair.turns.length - 1 ? "turn" : "turn before";
    text.dir = "auto";
    if (pair.turns.length > 1) {
      const role = document.createElement("small");
      role.textContent = turn.role;
      text.append(role);
    }
    text.append(turn.text);
    return text;
  });
  byId("turns").replaceChildren(...turns);
  byId("left").textContent = pair.left;
  byId("right").textContent = pair.right;
  byId("picture").hidden = !pair.images.length;
  byId("pair").classList.toggle("pictured", pair.images.length > 0);
  if (pair.images.length) await showImage(0);
}

// The image.

function showImage(number) {
  const images = state.pair.images;
  state.image = (number + images.length) % images.length;
  for (const id of ["image-back", "image-on"]) byId(id).hidden = images.length < 2;
  const image = byId("image");
  image.alt = `Image ${state.image + 1} of ${images.length} of this question`;
  move(1, 0, 0);
  return new Promise((settled) => {
    image.onload = () => { move(1, 0, 0); settled(); };
    image.onerror = () => {
      image.alt = "This image cannot be shown. Skip the pair, and say so.";
      settled();
    };
    image.src = images[state.image];
  });
}

function move(scale, x, y) {
  const viewer = byId("viewer"), image = byId("image");
  state.scale = Math.min(16, Math.max(1, scale));
  const room = (state.scale - 1) / 2;
  state.x = Math.min(room * viewer.clientWidth, Math.max(-room * viewer.clientWidth, x));
  state.y = Math.min(room * viewer.clientHeight, Math.max(-room * viewer.clientHeight, y));
  image.style.transform = `translate(${state.x}px, ${state.y}px) scale(${state.scale})`;
  const fit = Math.min(viewer.clientWidth / image.naturalWidth, viewer.clientHeight / image.naturalHeight);
  image.classList.toggle("coarse", fit * state.scale > 4);
  byId("zoomed").textContent = state.scale > 1 ? `${state.scale.toFixed(1)} ×` : "";
}

// What is under the point (px, py), measured from the middle of the viewer, stays there.
function zoom(factor, px = 0, py = 0) {
  const scale = Math.min(16, Math.max(1, state.scale * factor));
  const grown = scale / state.scale;
  move(scale, px - (px - state.x) * grown, py - (py - state.y) * grown);
}

function fromMiddle(event) {
  const box = byId("viewer").getBoundingClientRect();
  return [event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2];
}

const pan = (right, down) => move(state.scale, state.x - right * 80, state.y - down * 80);

function watchViewer() {
  const viewer = byId("viewer");
  let held = null;
  viewer.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : 0.8, ...fromMiddle(event));
  }, { passive: false });
  viewer.addEventListener("pointerdown", (event) => {
    held = [event.clientX - state.x, event.clientY - state.y];
    viewer.setPointerCapture(event.pointerId);
  });
  viewer.addEventListener("pointermove", (event) => {
    if (held) move(state.scale, event.clientX - held[0], event.clientY - held[1]);
  });
  for (const end of ["pointerup", "pointercancel"]) viewer.addEventListener(end, () => { held = null; });
  viewer.addEventListener("dblclick", (event) => (state.scale > 1 ? move(1, 0, 0) : zoom(3, ...fromMiddle(event))));
  byId("zoom-in").addEventListener("click", () => zoom(1.5));
  byId("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
  byId("zoom-all").addEventListener("click", () => move(1, 0, 0));
  byId("image-back").addEventListener("click", () => showImage(state.image - 1));
  byId("image-on").addEventListener("click", () => showImage(state.image + 1));
  new ResizeObserver(() => move(state.scale, state.x, state.y)).observe(viewer);
}

// Keys. Those with Ctrl, Alt or Meta are the browser's.

const KEYS = {
  ArrowLeft: () => judge("left"),
  ArrowRight: () => judge("right"),
  t: () => judge("tie"),
  b: () => judge("both bad"),
  s: () => openSkip(),
  u: () => undo(),
};
const VIEW = {
  "+": () => zoom(1.5),
  "=": () => zoom(1.5),
  "-": () => zoom(1 / 1.5),
  0: () => move(1, 0, 0),
  "[": () => showImage(state.image - 1),
  "]": () => showImage(state.image + 1),
};
const PAN = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function pressed(event) {
  const typing = event.target.matches("input:not([type=checkbox]), textarea");
  if (event.ctrlKey || event.altKey || event.metaKey || typing || byId("skip-dialog").open || byId("judge").hidden) return;
  const pictured = state.pair && state.pair.images.length;
  let act = null;
  if (event.shiftKey && PAN[event.key]) {
    if (pictured) act = () => pan(...PAN[event.key]);
  } else if (VIEW[event.key]) {
    if (pictured) act = VIEW[event.key];
  } else {
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (KEYS[key] && byId("keys-on").checked && !event.repeat) act = KEYS[key];
  }
  if (act) {
    event.preventDefault();
    act();
  }
}

// Skipping: a reason is required.

function openSkip() {
  if (state.busy || !state.pair) return;
  byId("skip-form").reset();
  byId("skip-alert").textContent = "";
  byId("skip-dialog").showModal();
}

function skipKeys(event) {
  const radios = document.querySelectorAll("#skip-form [name=reason]");
  if (event.target.id !== "own-reason" && /^[1-3]$/.test(event.key)) {
    event.preventDefault();
    radios[event.key - 1].checked = true;
    radios[event.key - 1].focus();
  }
}

function skip(event) {
  event.preventDefault();
  const picked = document.querySelector("#skip-form [name=reason]:checked");
  const reason = [picked && picked.value, byId("own-reason").value.trim()].filter(Boolean).join("; ");
  if (!reason) {
    byId("skip-alert").textContent = "Choose a reason, or say it in your own words.";
    byId("own-reason").focus();
    return;
  }
  byId("skip-dialog").close();
  judge("skip", reason);
}

// Names.

async function start(name) {
  setBusy(true);
  try {
    const data = await ask("/api/next", { annotator: name });
    sessionStorage.setItem("annotator", data.annotator);
    byId("alert").textContent = "";
    byId("who").hidden = false;
    state.name = data.annotator;
    openTab();
    await show(data);
    if (!byId("judge").hidden) byId("judge").focus();
  } catch (error) {
    byId("alert").textContent = error.message;
  } finally {
    setBusy(false);
  }
}

function changeName() {
  sessionStorage.removeItem("annotator");
  state.name = "";
  byId("status").textContent = "";
  byId("who").hidden = true;
  location.hash = "#judge";
  openTab();
  byId("name").value = "";
  byId("name").focus();
}

// Tabs.

function openTab() {
  const agreement = location.hash === "#agreement";
  byId("agreement").hidden = !agreement;
  byId("welcome").hidden = agreement || state.name !== "";
  byId("judge").hidden = agreement || state.name === "";
  for (const [id, on] of [["to-agreement", agreement], ["to-judge", !agreement]]) {
    if (on) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
  byId("status").textContent = "";
  if (agreement) showAgreement();
}

function table(name, head, rows) {
  const box = document.createElement("div");
  Object.assign(box, { className: "scroll", tabIndex: 0 });
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", name);
  const made = document.createElement("table");
  for (const [n, cells] of [head, ...rows].entries()) {
    const row = made.insertRow();
    for (const [place, text] of cells.entries()) {
      const cell = document.createElement(n === 0 || place === 0 ? "th" : "td");
      if (cell.tagName === "TH") cell.scope = n === 0 ? "col" : "row";
      cell.textContent = text;
      row.append(cell);
    }
  }
  box.append(made);
  return box;
}

const number = (value) => (value === null ? "–" : value.toFixed(2));
const share = ({ left, right, interval }) =>
  interval === null
    ? "nothing chosen yet"
    : `${Math.round((100 * left) / (left + right))} % (${interval.map((x) => Math.round(100 * x)).join(" to ")} %)`;

async function showAgreement() {
  let found;
  try {
    found = await ask("/api/agreement", {});
  } catch (error) {
    byId("alert").textContent = error.message;
    return;
  }
  byId("alert").textContent = "";
  byId("alpha").textContent =
    found.compared === 0
      ? "No pair has been judged by two annotators yet."
      : `Krippendorff's α is ${number(found.alpha)} over ${found.compared} pairs that at least two judged: 1 is agreement, 0 is chance.`;
  byId("kappa").replaceChildren(
    ...(found.kappa.length
      ? [table("Cohen's kappa", ["two annotators", "pairs of both", "Cohen's κ"],
          found.kappa.map((each) => [each.names.join(" and "), String(each.pairs), number(each.kappa)]))]
      : [])
  );
  byId("sides-all").textContent = `The left was chosen: ${share(found.everyone)}.`;
  byId("sides").replaceChildren(
    table("Sides", ["annotator", "left", "right", "left (95 % interval)"],
      found.sides.map((each) => [each.name, String(each.left), String(each.right), share(each)]))
  );
  const choices = Object.keys(SAID);
  byId("choices").replaceChildren(
    table("Choices", ["annotator", ...choices],
      found.annotators.map((each) => [each.name, ...choices.map((choice) => String(each.choices[choice] || 0))]))
  );
}

document.addEventListener("keydown", pressed);
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => judge(button.dataset.choice));
}
byId("skip").addEventListener("click", openSkip);
byId("skip-cancel").addEventListener("click", () => byId("skip-dialog").close());
byId("skip-form").addEventListener("submit", skip);
byId("skip-dialog").addEventListener("keydown", skipKeys);
byId("undo").addEventListener("click", undo);
byId("change-name").addEventListener("click", changeName);
byId("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  start(byId("name").value);
});
window.addEventListener("hashchange", openTab);
watchViewer();
openTab();
const remembered = sessionStorage.getItem("annotator");
if (remembered) start(remembered);
else if (location.hash !== "#agreement") byId("name").focus();
