// Two answers to one message: are their texts equal, and which was faster?

const AROUND = 24; // characters shown from where two texts differ

/**
 * @param {import("./answer.js").Answer} plain
 * @param {import("./answer.js").Answer} chosen
 */
export function verdict(plain, chosen) {
  const ratio = `${(chosen.speed / plain.speed).toFixed(2)}x the speed of plain decoding`;
  if (plain.text === chosen.text) return `The texts are equal. ${ratio}.`;
  const one = [...plain.text];
  const other = [...chosen.text];
  let at = 0;
  while (one[at] === other[at]) at += 1;
  const from = (text) => JSON.stringify(text.slice(at, at + AROUND).join(""));
  return (
    `The texts differ from character ${at + 1} on: ${from(one)} in the plain one, ` +
    `${from(other)} in the other. ${ratio}.`
  );
}
