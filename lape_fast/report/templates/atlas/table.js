// Elements, tables that can be sorted, and what goes out as a file.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  // Strings become text nodes: nothing in the data is ever read as HTML.
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function download(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = element("a", { href: address, download: name.replace(/[^\w.-]+/g, "-") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

function csvCell(value) {
  const text = value === null || value === undefined ? "" : String(value);
  // A spreadsheet would run a text that starts so.
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

const toCsv = (rows) => rows.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";

const AT_FIRST = 200;

// columns: {name, value(row), text(row), link(row)}; value is sorted by and exported, text is shown.
// sort: [column, descending]; changed(column, descending) is told when the reader sorts.
function dataTable({ caption, columns, rows, sort, changed }) {
  const [sorted, descending] = sort;
  const key = columns[sorted].value;
  const missing = (value) => value === null || value === undefined;
  const compare = (a, b) => {
    const [left, right] = [key(a), key(b)];
    if (missing(left) || missing(right)) return missing(left) - missing(right);
    const order = typeof left === "string" ? left.localeCompare(right, "en") : left - right;
    return descending ? -order : order;
  };
  const ordered = [...rows].sort(compare);
  const numeric = columns.map(({ value }) => rows.every((row) => typeof value(row) !== "string"));
  const head = element(
    "tr",
    {},
    ...columns.map(({ name }, column) => {
      const here = column === sorted;
      // Numbers are first wanted from the largest down.
      const next = here ? !descending : numeric[column];
      const button = element("button", { type: "button", onclick: () => changed(column, next) }, name);
      const direction = here ? (descending ? "descending" : "ascending") : null;
      return element("th", { scope: "col", class: numeric[column] ? "number" : null, "aria-sort": direction }, button);
    }),
  );
  const line = (row) =>
    element(
      "tr",
      {},
      ...columns.map(({ value, text = value, link }, column) => {
        const shown = missing(text(row)) ? "" : String(text(row));
        const content = link ? element("a", { href: link(row) }, shown) : shown;
        const attributes = column ? {} : { scope: "row" };
        return element(column ? "td" : "th", { ...attributes, class: numeric[column] ? "number" : null }, content);
      }),
    );
  const body = element("tbody", {}, ...ordered.slice(0, AT_FIRST).map(line));
  const region = element(
    "div",
    { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
    element("table", {}, element("caption", {}, element("span", {}, caption)), element("thead", {}, head), body),
  );
  const whole = element("div", {}, region);
  if (ordered.length > AT_FIRST) {
    const more = element("button", { type: "button", onclick: () => {
      body.append(...ordered.slice(AT_FIRST).map(line));
      more.remove();
    } }, `Show all ${number(ordered.length)} rows`);
    whole.append(more);
  }
  const csv = () => toCsv([columns.map(({ name }) => name), ...ordered.map((row) => columns.map(({ value }) => value(row)))]);
  return { element: whole, csv };
}
