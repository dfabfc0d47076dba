// Small helpers for the document. Text only ever becomes text: no markup is parsed anywhere.

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element.
 * @param {string} tag
 * @param {Object<string, string|boolean>} attributes `class`, `title`, ...; false leaves one out
 * @param {...(Node|string)} children
 */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children); // strings are appended as text nodes
  return element;
}

/** Show or hide an element. */
export function show(element, visible = true) {
  element.hidden = !visible;
}

/** "1 token", "2 tokens". */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
