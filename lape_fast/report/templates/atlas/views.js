// The views: each takes the state in the address and returns a title, what to see, and parts of figures and tables.

const link = (changes) => `#${new URLSearchParams(changes)}`;
const languageLink = (code) => link({ view: "language", id: code });
const neuronLink = (neuron) => link({ view: "neuron", id: neuronName(neuron) });
const go = (address) => {
  location.hash = address;
};

const ORDERS = {
  cluster: ["shared neurons", (a, b) => a - b],
  name: ["name", (a, b) => languages[a].name.localeCompare(languages[b].name, "en")],
  neurons: ["number of neurons", (a, b) => languages[b].neurons - languages[a].neurons],
};

function ordered(state) {
  const [, compare] = ORDERS[state.order] ?? ORDERS.cluster;
  return languages.map((_, place) => place).sort(compare);
}

const LANGUAGE_COLUMNS = [
  { name: "Language", value: (row) => row.name, link: (row) => languageLink(row.code) },
  { name: "Code", value: (row) => row.code },
  { name: "Neurons", value: (row) => row.neurons, text: (row) => number(row.neurons) },
];

function viewLayers(state) {
  const rows = ordered(state);
  const layers = Array.from({ length: header.layers }, (_, layer) => layer);
  const largest = Math.max(...languages.flatMap((language) => language.per_layer), 2);
  // Logarithmic: most neurons stand in a few layers.
  const share = (count) => Math.log(count) / Math.log(largest);
  const colour = (count) => blend(VIRIDIS, 1 - share(count));
  return {
    title: "Neurons by layer",
    text: "How many neurons each language has in each layer. Layer 0 reads the embeddings. Choose a cell to see the language.",
    orders: ORDERS,
    parts: [
      {
        name: "neurons-by-layer",
        figure: heatMap({
          rows: rows.map((place) => languages[place].name),
          columns: layers.map(String),
          columnTitle: "Layer",
          // A small model's few layers are not a sliver.
          cell: [Math.max(15, Math.min(44, 480 / header.layers)), 15],
          value: (row, layer) => languages[rows[row]].per_layer[layer] || null,
          colour,
          describe: (row, layer) =>
            `${languages[rows[row]].name}, layer ${layer}: ${number(languages[rows[row]].per_layer[layer])} neurons`,
          open: (row) => go(languageLink(languages[rows[row]].code)),
          legend: { from: "1", to: number(largest), colours: (x) => blend(VIRIDIS, 1 - x), title: "neurons, log scale" },
        }),
        table: {
          caption: "Selected neurons of each language, in all and by layer.",
          sort: [0, false],
          columns: [
            ...LANGUAGE_COLUMNS,
            ...layers.map((layer) => ({ name: String(layer), value: (row) => row.per_layer[layer] })),
          ],
          rows: rows.map((place) => languages[place]),
        },
      },
    ],
  };
}

function viewSimilarity(state) {
  const rows = ordered(state);
  const pairs = rows.flatMap((a, position) => rows.slice(position + 1).map((b) => ({ a, b, alike: similarity(a, b) })));
  const largest = Math.max(...pairs.map((pair) => pair.alike), 1e-9);
  const names = rows.map((place) => languages[place].name);
  return {
    title: "Languages that share neurons",
    text:
      "The Jaccard index of two languages: the neurons that both have, over those that either has. In the order of " +
      "shared neurons, the tree joins the most alike first (average linkage).",
    orders: ORDERS,
    parts: [
      {
        name: "similarity",
        figure: heatMap({
          rows: names,
          columns: names,
          cell: [13, 13],
          tree: (state.order ?? "cluster") === "cluster" ? header.merges : null,
          // A language is the same as itself; that would hide everything else.
          value: (row, column) => (row === column ? null : similarity(rows[row], rows[column])),
          colour: (alike) => blend(VIRIDIS, 1 - alike / largest),
          describe: (row, column) =>
            `${names[row]} and ${names[column]}: ${number(similarity(rows[row], rows[column]), 3)}`,
          open: (row) => go(languageLink(languages[rows[row]].code)),
          legend: { from: "0", to: number(largest, 2), colours: (x) => blend(VIRIDIS, 1 - x), title: "Jaccard index" },
        }),
        table: {
          caption: "Jaccard index of every pair of languages.",
          sort: [2, true],
          columns: [
            { name: "Language", value: (row) => languages[row.a].name, link: (row) => languageLink(languages[row.a].code) },
            { name: "Other language", value: (row) => languages[row.b].name, link: (row) => languageLink(languages[row.b].code) },
            { name: "Jaccard index", value: (row) => row.alike, text: (row) => number(row.alike, 3) },
          ],
          rows: pairs,
        },
      },
    ],
  };
}

function nearestTo(language, count) {
  return languages
    .map((_, place) => place)
    .filter((place) => place !== language)
    .map((place) => ({ place, alike: similarity(language, place) }))
    .sort((a, b) => b.alike - a.alike)
    .slice(0, count);
}

function viewLanguages() {
  const measured = (name) => languages.some((language) => language[name] !== null);
  const columns = [
    ...LANGUAGE_COLUMNS,
    { name: "Only its own", value: (row) => row.exclusive, text: (row) => number(row.exclusive) },
    { name: "Own share", value: (row) => (row.neurons ? row.exclusive / row.neurons : null), text: (row) => (row.neurons ? percent(row.exclusive / row.neurons) : "") },
    {
      name: "Nearest language",
      value: (row) => nearestTo(languageNumbers.get(row.code), 1).map(({ place }) => languages[place].name)[0] ?? "",
    },
  ];
  if (measured("stability")) {
    columns.push({ name: "Stability", value: (row) => row.stability, text: (row) => number(row.stability, 3) });
  }
  if (measured("tokens")) columns.push({ name: "Tokens", value: (row) => row.tokens, text: (row) => number(row.tokens) });
  return {
    title: "Languages",
    text:
      "Every language with its neurons, and how many no other language has. Stability is the Jaccard index of the " +
      "neurons that the two halves of its text select.",
    parts: [{ name: "languages", table: { caption: "Languages and their neurons.", sort: [0, false], columns, rows: languages } }],
  };
}

const NEURON_COLUMNS = [
  { name: "Neuron", value: neuronName, link: neuronLink },
  { name: "Layer", value: layerOf },
  { name: "Index", value: indexOf },
  { name: "Languages", value: (neuron) => owners(neuron).length },
];
const ENTROPY_COLUMN = { name: "Entropy (nats)", value: entropy, text: (neuron) => number(entropy(neuron), 3) };

function viewNeurons() {
  const every = Array.from(blocks.positions, (_, neuron) => neuron);
  const known = header.probabilities !== null;
  return {
    title: "Neurons",
    text:
      `The ${number(header.union)} of ${number(header.layers * header.width)} neurons that have a language` +
      (known ? ", the most specific (of lowest entropy) first." : "."),
    parts: [
      {
        name: "neurons",
        table: {
          caption: "Neurons, written as layer.index.",
          sort: known ? [4, false] : [1, false],
          columns: known ? [...NEURON_COLUMNS, ENTROPY_COLUMN] : NEURON_COLUMNS,
          rows: every,
        },
      },
    ],
  };
}

function viewLanguage(state) {
  const place = languageNumbers.get(state.id);
  if (place === undefined) return missing(`There is no language ${state.id} here.`);
  const language = languages[place];
  const own = Array.from(blocks.positions, (_, neuron) => neuron).filter((neuron) => isMember(place, neuron));
  const alone = new Array(header.layers).fill(0);
  for (const neuron of own) if (owners(neuron).length === 1) alone[layerOf(neuron)] += 1;
  const near = nearestTo(place, 12);
  const columns = [...NEURON_COLUMNS];
  if (header.probabilities) {
    columns.push(ENTROPY_COLUMN, {
      name: "Probability",
      value: (neuron) => probability(neuron, place),
      text: (neuron) => percent(probability(neuron, place)),
    });
  }
  return {
    title: language.name,
    facts: [
      ["Code", language.code],
      ["Neurons", `${number(language.neurons)} of ${number(header.layers * header.width)}`],
      ["Only its own", `${number(language.exclusive)} (${percent(language.exclusive / Math.max(1, language.neurons))})`],
      ["Stability", number(language.stability, 3)],
      ["Tokens counted", number(language.tokens)],
    ],
    parts: [
      {
        heading: "By layer",
        name: `${language.code}-layers`,
        figure: barChart({
          legend: [["only its own", PALETTE[0]], ["shared", PALETTE[5]]],
          unit: "neurons",
          rows: language.per_layer.map((count, layer) => ({
            label: `Layer ${layer}`,
            parts: [[alone[layer], PALETTE[0]], [count - alone[layer], PALETTE[5]]],
            text: number(count),
            note: `, ${number(alone[layer])} only its own`,
          })),
        }),
      },
      {
        heading: "Nearest languages",
        name: `${language.code}-nearest`,
        figure: near.length
          ? barChart({
              unit: "Jaccard index",
              rows: near.map(({ place: other, alike }) => ({
                label: languages[other].name,
                parts: [[alike, PALETTE[2]]],
                text: number(alike, 3),
                open: () => go(languageLink(languages[other].code)),
              })),
            })
          : null,
      },
      {
        heading: "Neurons",
        name: `${language.code}-neurons`,
        table: { caption: `Neurons of ${language.name}.`, sort: header.probabilities ? [4, false] : [1, false], columns, rows: own },
      },
    ],
  };
}

function viewNeuron(state) {
  const match = /^(\d+)\.(\d+)$/.exec(state.id ?? "");
  const neuron = match && neuronNumbers.get(Number(match[1]) * header.width + Number(match[2]));
  if (neuron === undefined || neuron === null) {
    return missing(`Neuron ${state.id} belongs to no language here; a neuron is written as layer.index, such as 12.345.`);
  }
  const holders = owners(neuron);
  const values = languages.map((language, place) => ({ language, place, p: probability(neuron, place) }));
  const sorted = [...values].sort((a, b) => b.p - a.p);
  const facts = [
    ["Layer", `${layerOf(neuron)} of 0 to ${header.layers - 1}`],
    ["Index", `${indexOf(neuron)} of 0 to ${header.width - 1}`],
    ["Languages", holders.map((place) => languages[place].name).join(", ")],
    ["Entropy", blocks.entropy ? `${number(entropy(neuron), 3)} nats of at most ${number(Math.log(languages.length), 3)}` : ""],
  ];
  const held = (place) => holders.includes(place);
  const figure =
    values[0].p === null
      ? null
      : barChart({
          legend: [["has the neuron", PALETTE[1]], ["does not", PALETTE[5]]],
          rows: sorted.map(({ language, place, p }) => ({
            label: language.name,
            parts: [[p, held(place) ? PALETTE[1] : PALETTE[5]]],
            text: percent(p),
            note: held(place) ? ", has the neuron" : "",
            open: () => go(languageLink(language.code)),
          })),
        });
  return {
    title: `Neuron ${neuronName(neuron)}`,
    text: figure
      ? `How often it fires in each language: the share of tokens, rounded to ${header.levels} levels that are finest near 0.`
      : "The page holds no activation probabilities of this neuron.",
    facts,
    parts: [
      {
        name: `neuron-${neuronName(neuron)}`,
        figure,
        table: {
          caption: `Activation probability of neuron ${neuronName(neuron)} in every language.`,
          sort: [figure ? 3 : 0, Boolean(figure)],
          columns: [
            { name: "Language", value: (row) => row.language.name, link: (row) => languageLink(row.language.code) },
            { name: "Code", value: (row) => row.language.code },
            { name: "Has it", value: (row) => (held(row.place) ? "yes" : "no") },
            { name: "Probability", value: (row) => row.p, text: (row) => percent(row.p) },
          ],
          rows: values,
        },
      },
    ],
  };
}

function viewAblation() {
  const { rows, columns, cost } = header.ablation;
  const largest = Math.max(...cost.flat().map((value) => Math.abs(value ?? 0)), 1e-9);
  const sentence = (row, column) =>
    `Without the neurons of ${languageName(rows[row])}, ${languageName(columns[column])} changes by ` +
    `${number(cost[row][column], 4)} bits per byte`;
  return {
    title: "What switching neurons off costs",
    text: "Bits per byte that each language (column) loses when the neurons of another (row) are switched off; above 0 is worse.",
    parts: [
      {
        name: "ablation",
        figure: heatMap({
          rows: rows.map(languageName),
          columns: columns.map(languageName),
          cell: rows.length > 60 ? [13, 13] : [18, 18],
          value: (row, column) => cost[row][column],
          colour: (value) => blend(DIVERGING, 0.5 + value / (2 * largest)),
          describe: sentence,
          open: (row) => languageNumbers.has(rows[row]) && go(languageLink(rows[row])),
          legend: { from: number(-largest, 2), to: number(largest, 2), colours: (x) => blend(DIVERGING, x), title: "bits per byte" },
        }),
        table: {
          caption: "Cost of switching off a language's neurons, in bits per byte.",
          sort: [2, true],
          columns: [
            { name: "Switched off", value: (row) => languageName(row.off) },
            { name: "Measured", value: (row) => languageName(row.measured) },
            { name: "Cost", value: (row) => row.cost, text: (row) => number(row.cost, 4) },
          ],
          rows: rows.flatMap((off, row) => columns.map((measured, column) => ({ off, measured, cost: cost[row][column] }))),
        },
      },
    ],
  };
}

function viewAlignment() {
  const { target, sentences, charts } = header.alignment;
  return {
    title: `Alignment of ${target}`,
    text:
      `How alike the model's states of the same sentence are in ${target} and other languages, layer by layer, over ` +
      `${number(sentences)} sentences. Read a curve against its baseline: sentences that are no translations.`,
    parts: charts.map(({ title, series }) => ({
      heading: title,
      name: `alignment-${title.toLowerCase()}`,
      figure: lineChart({ series, y: title }),
      table: {
        caption: `${title} by layer.`,
        sort: [0, false],
        columns: [
          { name: "Layer", value: (row) => row },
          ...series.map((each) => ({ name: each.name, value: (row) => each.values[row], text: (row) => number(each.values[row], 4) })),
        ],
        rows: series[0].values.map((_, layer) => layer),
      },
    })),
  };
}

const missing = (text) => ({ title: "Not found", text, parts: [] });

// Name -> [label, view]; those with a label stand in the navigation.
const VIEWS = {
  layers: ["Layers", viewLayers],
  similarity: ["Similarity", viewSimilarity],
  languages: ["Languages", viewLanguages],
  neurons: ["Neurons", viewNeurons],
  ...(header.ablation && { ablation: ["Ablation", viewAblation] }),
  ...(header.alignment && { alignment: ["Alignment", viewAlignment] }),
  language: [null, viewLanguage],
  neuron: [null, viewNeuron],
};
// What can be shown from the header alone.
const AT_ONCE = new Set(["layers", "ablation", "alignment"]);
