// The settings form: built from what the server says of its model, read into fields of a request.

import { byId, make, show } from "./dom.js";

/** Fields of the form by the name that the server's errors use. */
const FIELDS = {
  temperature: "temperature",
  max_tokens: "max-tokens",
  max_completion_tokens: "max-tokens",
  seed: "seed",
  drafter: "drafter",
  draft_length: "draft-length",
  ladder: "ladder",
};

/** What the server takes for `auto`, in words. */
let automatic = "";

const ladderChoice = () => document.querySelector("input[name=ladder]:checked").value;
const boxes = () => [...byId("exits").querySelectorAll("input")];

/** (6, 12, 30) */
export const shown = (ladder) => `(${ladder.join(", ")})`;

/**
 * Fill the form with the choices of a model.
 * @param {import("./exits.js").Levels} levels
 * @param {Object} facts `hispec` of an entry of `/v1/models`
 */
export function build(levels, facts) {
  byId("exits").replaceChildren(
    ...levels.exits.map((depth) => {
      const box = make("input", { type: "checkbox", value: String(depth), checked: true });
      return make("label", { class: "choice" }, box, levels.token(`depth ${depth}`, depth));
    }),
  );
  show(byId("exits"), levels.exits.length > 0);
  const drafters = (facts.drafters ?? []).map((name) => make("option", { value: name }, name));
  byId("drafter").replaceChildren(make("option", { value: "" }, "auto"), ...drafters);
  const named = [facts.ladder && shown([facts.ladder].flat()), facts.drafter].filter(Boolean);
  automatic = named.join(" ");
  byId("auto-note").textContent = automatic && `Auto is ${automatic} here.`;
  update();
}

/** Settings that the ladder excludes cannot be chosen; a ticked exit chooses the exits. */
export function listen() {
  byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
  byId("settings-form").addEventListener("input", () => clearMarks());
  byId("exits").addEventListener("change", () => {
    document.querySelector("input[name=ladder][value=exits]").checked = true;
  });
  byId("settings-form").addEventListener("change", update);
}

/** Whether the full model alone is chosen. */
export const plain = () => ladderChoice() === "plain";

function update() {
  for (const id of ["drafter", "draft-length"]) byId(id).disabled = plain();
}

/** The number in a field; undefined if it is empty. */
function number(id) {
  const { value } = byId(id);
  return value === "" ? undefined : Number(value);
}

/** Whether every field holds a value of its kind; the browser says what is wrong. */
export function valid() {
  const wrong = [...byId("settings-form").elements].find((field) => field.validity?.badInput);
  if (wrong) {
    byId("settings").open = true;
    wrong.reportValidity();
  }
  return !wrong;
}

/**
 * The fields of a request.
 * @param {import("./exits.js").Levels} levels
 * @param {boolean} alone the full model alone, whatever is chosen
 */
export function read(levels, alone = false) {
  const choice = alone ? "plain" : ladderChoice();
  const depths = boxes().filter((box) => box.checked).map((box) => Number(box.value));
  const hispec = { ladder: choice === "exits" ? [...depths, levels.full] : choice, trace: true };
  if (choice !== "plain") {
    hispec.drafter = byId("drafter").value || undefined;
    hispec.draft_length = number("draft-length");
  }
  return {
    temperature: number("temperature"),
    max_tokens: number("max-tokens"),
    seed: number("seed"),
    hispec,
  };
}

/** What a request will be decoded with, in words. */
export function name(fields) {
  const { ladder, drafter, draft_length: length } = fields.hispec;
  const words = [Array.isArray(ladder) ? shown(ladder) : ladder, drafter];
  if (length !== undefined) words.push(`draft length ${length}`);
  if (words.join("") === "auto" && automatic) words.push(automatic);
  return words.filter(Boolean).join(", ");
}

/** The system prompt. */
export const system = () => byId("system").value.trim();

/** Mark the field that an error names. */
export function mark(param) {
  const field = byId(FIELDS[param?.split(".").pop()] ?? "");
  if (!field) return;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", "trouble");
  byId("settings").open = true;
}

export function clearMarks() {
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
}
