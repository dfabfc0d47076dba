// What proposed a token: a free drafter, an exit, or the full model; its name and its colours.

import { make } from "./dom.js";

/** Depth of tokens that no exit made. */
export const FREE = -1;
const COLOURS = 4;

/** The levels of one model. */
export class Levels {
  /**
   * @param {number[]} exits depths below the full model
   * @param {number} full depth of the full model
   */
  constructor(exits, full) {
    this.exits = [...exits].filter((depth) => depth < full).sort((a, b) => a - b);
    this.full = full;
  }

  /** CSS class, the same as in `hispec report`. */
  style(depth) {
    if (depth === FREE) return "free";
    if (depth === this.full) return "full";
    const place = this.exits.indexOf(depth);
    return `exit${(place < 0 ? this.exits.length : place) % COLOURS}`;
  }

  name(depth) {
    if (depth === FREE) return "free draft";
    return depth === this.full ? `full model (depth ${depth})` : `exit at depth ${depth}`;
  }

  /** What can propose a token, shallowest first. */
  get all() {
    return [FREE, ...this.exits, this.full];
  }

  /** A token in its colour. */
  token(text, depth) {
    return make("span", { class: `t ${this.style(depth)}`, title: this.name(depth) }, text);
  }

  legend() {
    return this.all.map((depth) =>
      make("span", { class: `t ${this.style(depth)}` }, this.name(depth)),
    );
  }
}
