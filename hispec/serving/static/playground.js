// The playground: a chat with the served model that shows how its text was decoded.
// Nothing is stored: messages and the API key are gone when the page is closed.

import { Answer } from "./answer.js";
import { ApiError, chat, model } from "./api.js";
import { byId, make, show } from "./dom.js";
import { Levels } from "./exits.js";
import { Rounds } from "./rounds.js";
import * as settings from "./settings.js";
import { verdict } from "./verdict.js";

const state = {
  key: null,
  model: null, // name that requests are sent with
  levels: null,
  rounds: null,
  messages: [], // of the turns so far
  abort: null, // ends the running request
};
const answers = new WeakMap(); // by their elements

// ---- the model

async function connect() {
  trouble(null);
  show(byId("retry"), false);
  try {
    const entry = await model(state.key);
    const facts = entry.hispec ?? {};
    state.model = entry.id;
    state.levels = new Levels(facts.exits ?? [], facts.num_layers);
    state.rounds ??= new Rounds(state.levels);
    state.rounds.levels = state.levels;
    settings.build(state.levels, facts);
    byId("legend").replaceChildren(...state.levels.legend());
    const words = [entry.id, `${facts.num_layers} layers`, facts.dtype, facts.backend];
    byId("model").textContent = words.filter(Boolean).join(" · ");
  } catch (error) {
    byId("model").textContent = "No model";
    if (error.status === 401) return askForKey(error);
    trouble(error.message);
    show(byId("retry"));
  } finally {
    update();
  }
}

/** The key is missing (nothing is wrong yet) or it is refused. */
function askForKey(error) {
  show(byId("key-form"));
  byId("key-trouble").textContent = error.message;
  show(byId("key-trouble"), state.key !== null);
  byId("key").focus();
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  state.key = byId("key").value;
  byId("key").value = "";
  show(byId("key-form"), false);
  await connect();
  if (state.model) byId("prompt").focus();
});
byId("retry").addEventListener("click", connect);

// ---- what can be pressed

function update() {
  const busy = state.abort !== null;
  const ready = state.model !== null && !busy;
  byId("send").disabled = !ready;
  byId("compare").disabled = !ready || settings.plain();
  byId("stop").disabled = !busy;
  byId("clear").disabled = busy || !byId("log").querySelector(".turn");
}

function trouble(message, param = null) {
  byId("trouble").textContent = message ?? "";
  show(byId("trouble"), Boolean(message));
  settings.clearMarks();
  settings.mark(param);
}

// ---- what a screen reader hears: whole sentences, not tokens

const announcer = {
  pending: "",
  add(text) {
    this.pending += text;
    const end = this.pending.search(/[.!?:]\s(?!.*[.!?:]\s)|\n(?!.*\n)/s);
    if (end < 0) return;
    this.say(this.pending.slice(0, end + 1));
    this.pending = this.pending.slice(end + 1);
  },
  say(text) {
    if (text.trim()) byId("announce").textContent = text;
  },
  end(words) {
    this.say(`${this.pending} ${words}`);
    this.pending = "";
  },
};

// ---- a turn

/** Scroll down, unless the reader has scrolled up. */
function keepUp(change) {
  const log = byId("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/**
 * Stream one answer.
 * @param {boolean} aloud whether it is announced
 */
async function stream(answer, fields, messages, aloud) {
  let due = false;
  let drawn = false;
  const draw = () => {
    due = false;
    if (!drawn && answer.rounds.length) state.rounds.begin(answer);
    drawn ||= answer.rounds.length > 0;
    if (state.rounds.answer === answer) state.rounds.follow();
  };
  answer.start();
  for await (const chunk of chat(
    { model: state.model, messages, ...fields },
    state.key,
    state.abort.signal,
  )) {
    keepUp(() => answer.add(chunk));
    if (aloud) announcer.add(chunk.choices?.[0]?.delta?.content ?? "");
    if (!due) requestAnimationFrame(draw);
    due = true;
  }
  keepUp(() => answer.end());
  draw();
}

async function send(compare) {
  const text = byId("prompt").value.trim();
  if (!text || byId("send").disabled || !settings.valid()) return byId("prompt").focus();
  trouble(null);
  for (const failed of byId("log").querySelectorAll(".failed")) failed.remove();
  const system = settings.system();
  const asked = { role: "user", content: text };
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...state.messages, asked];
  const chosen = settings.read(state.levels);
  if (compare) chosen.seed ??= Math.floor(Math.random() * 2 ** 31); // both draw the same noise
  const runs = compare ? [settings.read(state.levels, true), chosen] : [chosen];
  if (compare) runs[0].seed = chosen.seed;
  const made = [];
  for (const fields of runs) made.push(newAnswer(settings.name(fields), made[0]));
  const turn = make(
    "article",
    { class: "turn" },
    make("p", { class: "user" }, text),
    make("div", { class: compare ? "answers two" : "answers" }, ...made.map((one) => one.element)),
  );
  show(byId("empty"), false);
  byId("log").append(turn);
  byId("log").scrollTop = byId("log").scrollHeight;
  byId("prompt").value = "";
  state.abort = new AbortController();
  update();
  byId("prompt").focus();
  const last = made[made.length - 1];
  let running = null;
  try {
    for (const [number, answer] of made.entries()) {
      running = answer;
      await stream(answer, runs[number], messages, answer === last);
    }
    if (compare) keepUp(() => turn.append(make("p", { class: "verdict" }, verdict(...made))));
    announcer.end(compare ? turn.lastChild.textContent : last.clock());
  } catch (error) {
    failed(error, turn, running, text);
  } finally {
    state.abort = null;
    const kept = [last, ...made].find((answer) => answer.text);
    if (kept) state.messages.push(asked, { role: "assistant", content: kept.text });
    update();
  }
}

function newAnswer(title, plain) {
  const answer = new Answer(state.levels, title, plain);
  answers.set(answer.element, answer);
  return answer;
}

/** The user has stopped the answer, or the server could not give it. */
function failed(error, turn, answer, text) {
  const stopped = error.name === "AbortError";
  keepUp(() => answer.end(stopped ? "stopped" : answer.text ? "broke off" : "no answer"));
  announcer.end(stopped ? "Stopped." : "");
  if (state.rounds.answer === answer) state.rounds.follow();
  for (const waiting of turn.querySelectorAll("[data-waiting]")) waiting.remove();
  if (!answer.text) {
    turn.classList.add("failed");
    byId("prompt").value ||= text; // so that it can be sent again
  }
  if (stopped) return;
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401) askForKey(error);
  else trouble(error.message, error.param);
}

// ---- events

byId("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send(false);
});
byId("compare").addEventListener("click", () => send(true));
byId("stop").addEventListener("click", () => {
  state.abort?.abort();
  byId("prompt").focus();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(false);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.abort?.abort();
});
byId("settings-form").addEventListener("change", update);
byId("clear").addEventListener("click", () => {
  state.messages = [];
  for (const turn of byId("log").querySelectorAll(".turn")) turn.remove();
  for (const id of ["rounds", "acceptance"]) show(byId(id), false);
  show(byId("empty"));
  trouble(null);
  update();
  byId("prompt").focus();
});
// A token, or the button below an answer, shows the rounds that made it.
byId("log").addEventListener("click", ({ target }) => {
  const answer = answers.get(target.closest(".answer"));
  const number = target.closest("[data-round]")?.dataset.round;
  if (!answer?.rounds.length || number === undefined) return;
  if (state.rounds.answer !== answer) state.rounds.begin(answer);
  state.rounds.follow();
  state.rounds.select(Math.max(Number(number), 0));
});

settings.listen();
if (matchMedia("(max-width: 55rem)").matches) byId("settings").open = false;
await connect();
