// The page: the state in the address, the view it names, the search, and the figures a reader can move about in.

const main = document.getElementById("main");
const status = document.getElementById("status");
const tip = element("div", { class: "tip", hidden: true });
document.body.append(tip);

let ready = false;
// What redraws the figures on the page when its colours change.
let redraws = [];

const readState = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function changed(state, changes) {
  const next = new URLSearchParams({ ...state, ...changes });
  for (const [name, value] of Object.entries(changes)) if (value === null) next.delete(name);
  return `#${next}`;
}

function render() {
  const state = { view: "layers", ...readState() };
  const [, view] = Object.hasOwn(VIEWS, state.view) ? VIEWS[state.view] : [null, () => missing(`There is no view ${state.view}.`)];
  redraws = [];
  tip.hidden = true;
  renderNavigation(state);
  if (!ready && !AT_ONCE.has(state.view)) {
    main.replaceChildren(element("p", {}, "Unpacking the neurons …"));
    return;
  }
  const shown = view(state);
  document.title = `${shown.title} – ${header.title}`;
  const parts = shown.parts.filter((part) => part.figure || part.table);
  const facts = (shown.facts ?? []).filter(([, value]) => value !== "");
  main.replaceChildren(
    element("h2", { id: "title", tabindex: "-1" }, shown.title),
    shown.text ? element("p", {}, shown.text) : "",
    facts.length ? element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])) : "",
    shown.orders ? renderOrders(shown.orders, state) : "",
    ...parts.map((part) => renderPart(part, state)),
  );
  status.textContent = shown.title;
}

function renderNavigation(state) {
  const links = Object.entries(VIEWS)
    .filter(([, [label]]) => label)
    .map(([name, [label]]) => element("a", { href: link({ view: name }), "aria-current": name === state.view ? "page" : null }, label));
  document.getElementById("views").replaceChildren(...links);
}

function renderOrders(orders, state) {
  const options = Object.entries(orders).map(([name, [label]]) =>
    element("option", { value: name, selected: name === (state.order ?? "cluster") }, label),
  );
  const choice = element("select", { id: "order", onchange: () => go(changed(state, { order: choice.value })) }, ...options);
  return element("div", { class: "controls" }, element("label", {}, "Order by", choice));
}

function renderPart(part, state) {
  const asTable = part.table && (!part.figure || state.as === "table");
  const [column, down] = /^(\d+)(-?)$/.exec(state.sort ?? "")?.slice(1) ?? [];
  const sort = column !== undefined && part.table?.columns[column] ? [Number(column), down === "-"] : part.table?.sort;
  const table = part.table && {
    ...part.table,
    sort,
    changed: (next, descending) => go(changed(state, { sort: `${next}${descending ? "-" : ""}` })),
  };
  const made = asTable ? dataTable(table) : null;
  const controls = [];
  const button = (label, action) => controls.push(element("button", { type: "button", onclick: action }, label));
  if (part.table && part.figure) {
    button(asTable ? "Show as a figure" : "Show as a table", () => go(changed(state, { as: asTable ? null : "table", sort: null })));
  }
  if (part.table) button("Download CSV", () => download(`${part.name}.csv`, "text/csv", (made ?? dataTable(table)).csv()));
  if (part.figure && !asTable) button("Download SVG", () => download(`${part.name}.svg`, "image/svg+xml", toSvg(part.figure)));
  return element(
    "div",
    {},
    part.heading ? element("h3", {}, part.heading) : null,
    element("div", { class: "controls" }, ...controls),
    asTable ? made.element : renderFigure(part.figure, part.heading ?? document.title),
  );
}

function toSvg(figure) {
  const surface = new SvgSurface(figure.width, figure.height);
  figure.draw(surface, theme());
  return surface.toString();
}

// A figure on a canvas: a pointer or the arrow keys choose a cell, whose words are shown and read; Enter opens it.
function renderFigure(figure, label) {
  const canvas = element("canvas", {
    tabindex: "0",
    role: "application",
    "aria-roledescription": "figure",
    "aria-label": `${label}. Arrow keys move between cells, Enter opens one.`,
  });
  const cursor = element("div", { class: "cursor", hidden: true });
  const draw = () => figure.draw(new CanvasSurface(canvas, figure.width, figure.height), theme());
  draw();
  redraws.push(draw);
  let place = null;
  const inFigure = (event) => {
    const frame = canvas.getBoundingClientRect();
    // Printed or narrowed, the canvas may be smaller than it was drawn.
    const shrink = figure.width / frame.width;
    return figure.find((event.clientX - frame.left) * shrink, (event.clientY - frame.top) * shrink);
  };
  canvas.addEventListener("pointermove", (event) => {
    const found = inFigure(event);
    tip.hidden = !found;
    canvas.style.cursor = found && figure.open ? "pointer" : "default";
    if (!found) return;
    tip.textContent = figure.describe(...found);
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)}px`;
  });
  canvas.addEventListener("pointerleave", () => {
    tip.hidden = true;
  });
  canvas.addEventListener("click", (event) => {
    const found = inFigure(event);
    if (found) figure.open?.(...found);
  });
  canvas.addEventListener("blur", () => {
    cursor.hidden = true;
  });
  const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && place) figure.open?.(...place);
    const move = MOVES[event.key];
    if (!move) return;
    event.preventDefault();
    const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
    place = place ? [within(place[0] + move[0], figure.rows), within(place[1] + move[1], figure.columns)] : [0, 0];
    const [x, y, width, height] = figure.box(...place);
    Object.assign(cursor.style, { left: `${x}px`, top: `${y}px`, width: `${width}px`, height: `${height}px` });
    cursor.hidden = false;
    cursor.scrollIntoView({ block: "nearest", inline: "nearest" });
    status.textContent = figure.describe(...place);
  });
  return element("div", { class: "scroll" }, element("div", { class: "figure" }, canvas, cursor));
}

const search = document.getElementById("search");
const found = document.getElementById("found");
const MOST_FOUND = 12;
let marked = 0;

// Languages by the start of a word of their name or by code, then by any part; a neuron by layer.index.
function matches(text) {
  const wanted = text.trim().toLowerCase();
  if (!wanted) return [];
  const neuron = /^(\d+)\s*[.:/ ]\s*(\d+)$/.exec(wanted);
  if (neuron) {
    const [layer, index] = neuron.slice(1).map(Number);
    const known = index < header.width && neuronNumbers.has(layer * header.width + index);
    return known ? [[`Neuron ${layer}.${index}`, link({ view: "neuron", id: `${layer}.${index}` })]] : [];
  }
  const rank = ({ name, code }) => {
    const words = ` ${name.toLowerCase()}`;
    if (code.toLowerCase().startsWith(wanted)) return 0;
    return words.includes(` ${wanted}`) ? 1 : words.includes(wanted) || code.toLowerCase().includes(wanted) ? 2 : 3;
  };
  return languages
    .map((language) => [rank(language), language])
    .filter(([order]) => order < 3)
    .sort(([a, { name: left }], [b, { name: right }]) => a - b || left.localeCompare(right, "en"))
    .slice(0, MOST_FOUND)
    .map(([, { name, code }]) => [`${name} (${code})`, languageLink(code)]);
}

function showMatches() {
  const list = matches(search.value);
  marked = Math.min(marked, Math.max(0, list.length - 1));
  found.replaceChildren(
    ...list.map(([label, address], position) =>
      element("li", {
        role: "option",
        id: `found-${position}`,
        "aria-selected": String(position === marked),
        // Before the input loses the focus, which closes the list.
        onpointerdown: () => open(address),
      }, label),
    ),
  );
  found.hidden = !list.length;
  search.setAttribute("aria-expanded", String(!found.hidden));
  if (list.length) search.setAttribute("aria-activedescendant", `found-${marked}`);
  else search.removeAttribute("aria-activedescendant");
  if (search.value.trim() && !list.length) status.textContent = "Nothing found";
  return list;
}

function open(address) {
  search.value = "";
  marked = 0;
  showMatches();
  go(address);
}

search.addEventListener("input", () => {
  marked = 0;
  showMatches();
});
search.addEventListener("blur", () => {
  found.hidden = true;
  search.setAttribute("aria-expanded", "false");
});
search.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) {
    event.preventDefault();
    const count = found.children.length;
    marked = count ? (marked + step + count) % count : 0;
    showMatches();
  } else if (event.key === "Enter") {
    const list = showMatches();
    if (list.length) open(list[marked][1]);
  } else if (event.key === "Escape") {
    search.value = "";
    showMatches();
  }
});

document.getElementById("skip").addEventListener("click", (event) => {
  // The fragment holds the state, so the link moves the focus instead.
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", () => {
  const before = document.getElementById("title")?.textContent;
  render();
  const title = document.getElementById("title");
  // Another view begins at its title; the same one, sorted or turned into a table, stays where it is.
  if (title && title.textContent !== before) {
    scrollTo(0, 0);
    title.focus();
  }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));

document.getElementById("lead").textContent =
  `${number(languages.length)} languages, ${number(header.layers)} layers of ${number(header.width)} neurons; ` +
  `${number(header.union)} neurons have a language` +
  (header.metadata.name ? `, selected by ${header.metadata.name}.` : ".");
render();
inflate().then(() => {
  ready = true;
  document.documentElement.dataset.ready = "true";
  if (!AT_ONCE.has(readState().view ?? "layers")) render();
});
