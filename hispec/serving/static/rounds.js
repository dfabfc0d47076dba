// Drawings: one round (draft, verify, commit), the rounds before it, and the acceptance of drafts.

import { byId, count, make, show } from "./dom.js";

const SHOWN = 60; // rounds in the history
const PHASES = 3;
const PHASE_MS = 450;

const visible = (text) => text.replaceAll("\n", "↵").replaceAll(" ", "\u00a0") || "·";

/** Draws the rounds of one answer, follows the newest, and replays them slowly. */
export class Rounds {
  /** @param {import("./exits.js").Levels} levels */
  constructor(levels) {
    this.levels = levels;
    this.answer = null;
    this.at = 0;
    this.timer = null;
    this.drawn = 0;
    byId("at").addEventListener("input", () => {
      this.stop();
      this.select(byId("at").valueAsNumber - 1);
    });
    byId("replay").addEventListener("click", () => (this.timer ? this.stop() : this.replay()));
  }

  /** Begin with another answer. */
  begin(answer) {
    this.stop();
    this.answer = answer;
    this.at = 0;
    byId("history").replaceChildren();
    this.drawn = 0;
  }

  /** Draw what has come since the last time. */
  follow() {
    const { rounds } = this.answer;
    this.bars();
    if (!rounds.length) return;
    show(byId("rounds"));
    byId("at").max = String(rounds.length);
    for (const round of rounds.slice(this.drawn)) byId("history").append(this.column(round));
    this.drawn = rounds.length;
    while (byId("history").childElementCount > SHOWN) byId("history").firstChild.remove();
    if (!this.timer) this.select(rounds.length - 1, false);
  }

  /** Draw the round with this number. */
  select(number, highlight = true) {
    this.at = number;
    const round = this.answer.rounds[number];
    byId("at").value = String(number + 1);
    byId("at-number").textContent = `${number + 1} of ${this.answer.rounds.length}`;
    byId("round-words").textContent = this.words(round);
    const cells = Math.max(round.drafts.length, round.tokens.length, 1);
    byId("round").style.setProperty("--cells", String(cells));
    byId("round").replaceChildren(...this.lanes(round));
    byId("round").dataset.phase = String(PHASES);
    if (highlight) this.answer.highlight(number);
  }

  words({ drafts, accepted, tokens }) {
    const committed = `${count(tokens.length, "token")} committed`;
    if (!drafts.length) return `No draft; the full model made the next token itself.`;
    const makers = [...new Set(drafts)].map((depth) => this.levels.name(depth)).join(" and ");
    const thrown = drafts.length - accepted;
    return `${drafts.length} drafted (${makers}), ${accepted} accepted, ${thrown} thrown out; ${committed}.`;
  }

  /** Three rows of cells: what was drafted, what the verifier said, what was committed. */
  lanes({ drafts, accepted, tokens }) {
    const cell = (text, kind, title = false) =>
      make("span", { class: `cell ${kind}`, title }, text);
    const known = (place) => (place < accepted && tokens[place] ? tokens[place].text : null);
    const lane = (title, cells) =>
      make("div", { class: "lane" }, make("span", { class: "lane-name" }, title), ...cells);
    const drafted = drafts.map((depth, place) => {
      const text = known(place);
      const style = this.levels.style(depth);
      return cell(text === null ? "?" : visible(text), `t ${style}`, this.levels.name(depth));
    });
    const verified = drafts.map((_, place) =>
      place < accepted ? cell("✓", "yes", "accepted") : cell("✕", "no", "thrown out"),
    );
    const committed = tokens.map(({ text, exit }) =>
      cell(visible(text), `t ${this.levels.style(exit)}`, this.levels.name(exit)),
    );
    const none = () => [make("span", { class: "cell none" }, "nothing")];
    return [
      lane("Draft", drafted.length ? drafted : none()),
      lane("Verify", verified.length ? verified : none()),
      lane("Commit", committed.length ? committed : none()),
    ];
  }

  /** A round in the history. */
  column({ drafts, accepted, tokens }) {
    const box = (kind) => make("i", { class: kind });
    const up = tokens.map(({ exit }) => box(this.levels.style(exit)));
    const down = drafts.slice(accepted).map((depth) => box(`out ${this.levels.style(depth)}`));
    return make("span", {}, make("b", {}, ...up), make("b", {}, ...down));
  }

  /** Acceptance of each drafter. */
  bars() {
    const found = this.answer.acceptance;
    const drafters = this.levels.all.filter((depth) => found.get(depth)?.drafted);
    show(byId("acceptance"));
    const rows = drafters.map((depth) => {
      const { drafted, accepted } = found.get(depth);
      const share = accepted / drafted;
      const fill = make("span", { class: `fill ${this.levels.style(depth)}` });
      fill.style.setProperty("--share", String(share));
      return make(
        "li",
        {},
        make("span", {}, this.levels.name(depth)),
        make("small", {}, `${accepted} of ${count(drafted, "draft")}`),
        make("span", { class: "value" }, `${Math.round(100 * share)}%`),
        make("span", { class: "bar", "aria-hidden": "true" }, fill),
      );
    });
    byId("bars").replaceChildren(...(rows.length ? rows : [make("li", {}, "Nothing was drafted.")]));
    const perPass = this.answer.usage?.hispec?.tokens_per_target_pass;
    const words = `${perPass?.toFixed(2)} tokens per full-model pass (plain: 1)`;
    byId("per-pass").textContent = perPass ? words : "";
  }

  /** Go through the rounds from the start, one phase after the other. */
  replay() {
    byId("replay").setAttribute("aria-pressed", "true");
    byId("replay").textContent = "Pause";
    let number = this.at + 1 < this.answer.rounds.length ? this.at : 0;
    let phase = 0;
    const step = () => {
      if (phase === 0) this.select(number);
      byId("round").dataset.phase = String(++phase);
      if (phase < PHASES) return;
      phase = 0;
      number += 1;
      if (number >= this.answer.rounds.length) this.stop();
    };
    this.timer = setInterval(step, PHASE_MS);
    step();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    byId("replay").setAttribute("aria-pressed", "false");
    byId("replay").textContent = "Replay";
    byId("round").dataset.phase = String(PHASES);
  }
}
