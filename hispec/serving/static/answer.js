// One answer of the model as it streams in: its tokens, its rounds, its clock.

import { FREE } from "./exits.js";
import { count, make } from "./dom.js";

/**
 * @typedef {Object} Round
 * @property {number[]} drafts depth of what made each draft, -1 for a free drafter
 * @property {number} accepted how many of them were accepted
 * @property {{text: string, exit: number}[]} tokens committed
 */

export class Answer {
  /**
   * @param {import("./exits.js").Levels} levels
   * @param {string} title the setting that decodes it
   * @param {?Answer} plain the answer of plain decoding that it is compared with
   */
  constructor(levels, title, plain = null) {
    this.levels = levels;
    this.plain = plain;
    /** @type {Round[]} */
    this.rounds = [];
    this.text = "";
    this.usage = null;
    this.finish = null;
    this.began = 0;
    this.seconds = 0;
    this.count = 0;
    this.title = make("h3", {}, title);
    this.tokens = make("p", { class: "tokens", "aria-busy": "true" });
    this.figures = make("span", {}, "waiting …");
    this.button = make("button", { type: "button", "data-round": "0", hidden: true }, "Rounds");
    const below = make("p", { class: "figures" }, this.figures, this.button);
    this.element = make("div", { class: "answer" }, this.title, this.tokens, below);
    this.element.dataset.waiting = "";
  }

  /** The request is sent: the clock runs. */
  start() {
    delete this.element.dataset.waiting;
    this.began = performance.now();
  }

  /** Take a chunk of the stream. */
  add(chunk) {
    this.seconds = (performance.now() - this.began) / 1000;
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    this.finish = choice?.finish_reason ?? this.finish;
    const content = choice?.delta?.content ?? "";
    const tokens = chunk.hispec?.tokens ?? (content ? [{ text: content, exit: null }] : []);
    this.text += content;
    this.count += tokens.length;
    if (chunk.hispec?.round) this.rounds.push(round(chunk.hispec, this.levels));
    for (const { text, exit } of tokens) {
      const span = exit === null ? make("span", {}, text) : this.levels.token(text, exit);
      span.dataset.round = String(this.rounds.length - 1);
      this.tokens.append(span);
    }
    this.figures.textContent = this.clock();
  }

  /** The server's clock once it has told it, this page's before. */
  get speed() {
    const told = this.usage?.hispec?.tokens_per_second;
    return told ?? (this.seconds > 0 ? this.count / this.seconds : 0);
  }

  clock() {
    const tokens = this.usage?.completion_tokens ?? this.count;
    const seconds = this.usage?.hispec?.seconds ?? this.seconds;
    const rate = `${this.speed.toFixed(1)} tokens/s`;
    const ratio = this.plain?.speed ? `, ${(this.speed / this.plain.speed).toFixed(2)}x plain` : "";
    return `${count(tokens, "token")} in ${seconds.toFixed(2)} s: ${rate}${ratio}`;
  }

  /**
   * The stream has ended.
   * @param {string} how "" if the model ended it, else a word such as "stopped"
   */
  end(how = "") {
    this.tokens.setAttribute("aria-busy", "false");
    const perPass = this.usage?.hispec?.tokens_per_target_pass;
    const words = [this.count ? this.clock() : ""];
    if (perPass) words.push(`${perPass.toFixed(2)} tokens per pass of the full model`);
    if (this.finish === "length") words.push("cut at max tokens");
    if (how) words.push(how);
    this.figures.textContent = words.filter(Boolean).join(" · ");
    this.button.hidden = !this.rounds.length;
    if (!this.count) this.tokens.remove();
  }

  /** Mark the tokens of one round. */
  highlight(number) {
    for (const span of this.tokens.querySelectorAll(".now")) span.classList.remove("now");
    const spans = this.tokens.querySelectorAll(`[data-round="${number}"]`);
    for (const span of spans) span.classList.add("now");
  }

  /** Drafted and accepted tokens by depth: the server's counts, those of the rounds before. */
  get acceptance() {
    const { drafted_per_exit: drafted, accepted_per_exit: accepted } = this.usage?.hispec ?? {};
    const found = new Map();
    if (drafted) {
      for (const [depth, number] of Object.entries(drafted)) {
        found.set(Number(depth), { drafted: number, accepted: accepted?.[depth] ?? 0 });
      }
      return found;
    }
    for (const { drafts, accepted: taken } of this.rounds) {
      drafts.forEach((depth, place) => {
        const counts = found.get(depth) ?? { drafted: 0, accepted: 0 };
        counts.drafted += 1;
        counts.accepted += place < taken ? 1 : 0;
        found.set(depth, counts);
      });
    }
    return found;
  }
}

/** A round of the trace; drafters are named once each, or once per draft. */
function round({ round: { drafted, accepted, drafters = [] }, tokens = [] }, levels) {
  const depths = drafters.length ? drafters : [levels.exits[0] ?? FREE];
  const drafts = Array.from({ length: drafted }, (_, place) => {
    const made = tokens[place]?.exit;
    if (drafters.length === drafted) return depths[place];
    return place < accepted && made !== undefined ? made : depths[depths.length - 1];
  });
  return { drafts, accepted, tokens };
}
