// The atlas's data: the header that is there at once, and the blocks that are inflated behind the first view.

const header = JSON.parse(document.getElementById("header").textContent);
const languages = header.languages;
const languageNumbers = new Map(languages.map((language, number) => [language.code, number]));
const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };

// Name -> typed array, once `inflated` is done.
const blocks = {};
// layer * width + neuron -> number of the neuron in the blocks.
const neuronNumbers = new Map();

async function inflate() {
  const text = atob(document.getElementById("blocks").textContent);
  const deflated = Uint8Array.from(text, (character) => character.charCodeAt(0));
  const stream = new Blob([deflated]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  let offset = 0;
  for (const [name, [type, size]] of Object.entries(header.blocks)) {
    const length = size * ARRAYS[type].BYTES_PER_ELEMENT;
    // Copied, because a view would have to start on a multiple of its entries' size.
    blocks[name] = new ARRAYS[type](bytes.slice(offset, offset + length));
    offset += length;
  }
  blocks.positions.forEach((position, number) => neuronNumbers.set(position, number));
}

const similarity = (a, b) => blocks.similarity[a * languages.length + b] / 65535;

function isMember(language, neuron) {
  const row = Math.ceil(header.union / 8);
  return (blocks.members[language * row + (neuron >> 3)] >> (neuron & 7)) & 1;
}

const owners = (neuron) => languages.map((_, number) => number).filter((number) => isMember(number, neuron));

// The probability that a neuron fires for a token of a language; null where the page does not hold it.
function probability(neuron, language) {
  if (!header.probabilities || neuron >= header.probabilities) return null;
  const root = blocks.probability[neuron * languages.length + language] / (header.levels - 1);
  return root * root;
}

function entropy(neuron) {
  return blocks.entropy ? (blocks.entropy[neuron] / 65535) * Math.log(Math.max(2, languages.length)) : null;
}

const layerOf = (neuron) => Math.floor(blocks.positions[neuron] / header.width);
const indexOf = (neuron) => blocks.positions[neuron] % header.width;
const neuronName = (neuron) => `${layerOf(neuron)}.${indexOf(neuron)}`;

const languageName = (code) => (languageNumbers.has(code) ? languages[languageNumbers.get(code)].name : code);

const number = (value, digits = 0) =>
  value === null || value === undefined
    ? ""
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const percent = (value, digits = 1) => (value === null || value === undefined ? "" : `${number(100 * value, digits)} %`);
