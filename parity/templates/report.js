"use strict";
(() => {
  const PAGE = 100; // rows that a table shows before it asks
  const TEXTS = ["kind", "half", "dtype", "name", "reason", "block", "mode"];
  const FIGURES = ["order", "max_abs", "max_rel", "mean_abs", "cosine", "tolerance", "floor", "factor"];
  const FILTERS = ["text", "verdict", "model", "level", "dtype", "half"];
  const collator = new Intl.Collator("en", { numeric: true });
  const byId = (id) => document.getElementById(id);

  // Rows

  const models = JSON.parse(byId("data").textContent);
  const allRows = [];
  for (const model of models) {
    model.rows = [];
    for (const level of model.levels) {
      for (const group of level.groups) {
        group.rows = Array.from({ length: group.count }, (_, index) => rowOf(model.name, level.name, group, index));
        for (const row of group.rows) model.rows.push(row);
      }
    }
    for (const row of model.rows) allRows.push(row);
  }

  function rowOf(model, level, group, index) {
    const at = (name) => (Array.isArray(group[name]) ? group[name][index] : group[name]);
    const row = { model, level, passed: at("passed"), matches: true };
    for (const name of TEXTS) row[name] = at(name) ?? "";
    for (const name of FIGURES) row[name] = at(name) ?? null;
    row.used = null;
    if (row.max_rel === 0) row.used = 0;
    else if (row.max_rel !== null && row.tolerance > 0) row.used = row.max_rel / row.tolerance;
    return row;
  }

  const anchor = (...parts) => parts.filter(Boolean).map(encodeURIComponent).join("/");
  const rowAnchor = (row) => anchor(row.model, row.level, row.name, row.dtype, row.half);

  // Figures as text, as the page's own

  function exponential(value) {
    if (value === null) return "n/a";
    if (value === 0) return "0";
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${mantissa}e${exponent[0]}${exponent.slice(1).padStart(2, "0")}`;
  }

  function share(value) {
    if (value === null) return "n/a";
    if (value === 0 || value === 1) return `${100 * value}%`;
    if (value < 0.001) return "< 0.1%";
    return value < 10 ? `${(100 * value).toFixed(1)}%` : `${exponential(value)} x`;
  }

  function figureText(name, value) {
    if (name === "used") return share(value);
    if (name === "cosine") return value === null ? "n/a" : value.toFixed(6);
    if (value === null && ["order", "mean_abs", "floor", "factor"].includes(name)) return "";
    return name === "order" ? String(value) : exponential(value);
  }

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  const verdict = (passed) =>
    element("span", { className: passed ? "pass" : "fail", textContent: passed ? "✓ pass" : "✕ FAIL" });

  function tableRow(row, columns, id) {
    const name = element("a", { className: "place", href: `#${rowAnchor(row)}`, textContent: row.name });
    const head = element("th", { scope: "row" }, name);
    if (row.reason) head.append(" ", element("small", { textContent: row.reason }));
    const made = element("tr", {}, head);
    if (id) made.id = rowAnchor(row);
    for (const column of columns) {
      if (column === "name") made.append(head);
      else if (column === "passed") made.append(element("td", {}, verdict(row.passed)));
      else if (column in row && typeof row[column] === "string") made.append(element("td", { textContent: row[column] }));
      else made.append(element("td", { className: "number", textContent: figureText(column, row[column]) }));
    }
    return made;
  }

  // Sorting: what is not finite is the worst; what a row does not have comes last

  function sortValue(row, key) {
    const value = row[key];
    if (typeof value === "string") return value;
    if (key === "passed") return Number(value);
    if (value !== null) return value;
    return { max_abs: Infinity, max_rel: Infinity, used: Infinity, cosine: -Infinity }[key] ?? null;
  }

  function sorted(items, { key, descending }, valueOf = sortValue) {
    if (!key) return items;
    const keyed = items.map((item) => [valueOf(item, key), item]);
    const sign = descending ? -1 : 1;
    keyed.sort(([one], [other]) => {
      if (one === null || other === null) return (one === null) - (other === null);
      if (typeof one === "string") return sign * collator.compare(one, other);
      return one === other ? 0 : sign * (one < other ? -1 : 1);
    });
    return keyed.map(([, item]) => item);
  }

  const worstFirst = (key) => !["name", "model", "level", "half", "dtype", "order", "cosine", "passed"].includes(key);

  /** Makes a table's heads buttons: sorts the worst first, then the other way, then as it was. */
  function makeSortable(table, order, changed) {
    const heads = [...table.tHead.rows[0].cells];
    const show = () => {
      for (const head of heads) {
        const direction = order.descending ? "descending" : "ascending";
        head.setAttribute("aria-sort", head.dataset.sort === order.key ? direction : "none");
      }
    };
    for (const head of heads) {
      const button = element("button", { type: "button", textContent: head.textContent });
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const key = head.dataset.sort;
        const first = worstFirst(key);
        if (order.key !== key) Object.assign(order, { key, descending: first });
        else if (order.descending === first) order.descending = !first;
        else Object.assign(order, { key: "", descending: false });
        show();
        changed();
      });
    }
    show();
    return show;
  }

  function moreButton(shown, total, columns, more) {
    const rest = total - shown;
    const cell = element("td", { colSpan: columns });
    const add = (text, count) => {
      const button = element("button", { type: "button", textContent: text });
      button.addEventListener("click", () => more(shown + count));
      cell.append(button, " ");
    };
    if (rest > PAGE) add(`Show ${PAGE} more`, PAGE);
    if (rest <= 2000) add(rest > PAGE ? `Show all ${total}` : `Show ${rest} more`, rest);
    cell.append(` ${shown.toLocaleString("en")} of ${total.toLocaleString("en")} rows shown`);
    return element("tr", { className: "more" }, cell);
  }

  // The table of one level: a line per group, which unfolds to its rows

  class LevelTable {
    constructor(table, level) {
      this.table = table;
      this.order = { key: "", descending: false };
      this.columns = [...table.tHead.rows[0].cells].map((head) => head.dataset.sort);
      this.groups = level.groups.map((group, index) => ({ ...group, body: table.tBodies[index], open: false, shown: PAGE }));
      makeSortable(table, this.order, () => this.update());
      for (const group of this.groups) if (group.count > 1) this.makeFolding(group);
      this.update();
    }

    makeFolding(group) {
      const head = group.body.rows[0].cells[0];
      group.button = element("button", { type: "button", className: "fold" }, ...head.childNodes);
      group.button.addEventListener("click", () => this.unfold(group, !group.open));
      head.replaceChildren(group.button);
    }

    unfold(group, open) {
      group.open = open;
      this.fill(group);
    }

    update() {
      const worst = (group, key) => {
        if (key === "name") return group.kind;
        if (key === "half" || key === "dtype") return group[key];
        const values = group.rows.map((row) => sortValue(row, key)).filter((value) => value !== null);
        const least = key === "cosine" || key === "order" || key === "passed";
        return values.length ? values.reduce((one, other) => (one < other === least ? one : other)) : null;
      };
      this.table.append(...sorted(this.groups, this.order, worst).map((group) => group.body));
      for (const group of this.groups) this.fill(group);
    }

    fill(group) {
      const rows = group.rows.filter((row) => row.matches);
      group.body.hidden = !rows.length;
      if (!group.button) return;
      group.button.setAttribute("aria-expanded", group.open);
      const count = rows.length < group.count ? `${rows.length} of ${group.count} rows match` : `${group.count} rows`;
      group.button.querySelector("small").textContent = `${count}, the worst of ${rows.length < group.count ? "all" : "each"}`;
      while (group.body.rows.length > 1) group.body.rows[1].remove();
      if (!group.open) return;
      const shown = sorted(rows, this.order).slice(0, group.shown);
      group.body.append(...shown.map((row) => tableRow(row, this.columns, true)));
      if (shown.length < rows.length) {
        const more = (count) => ((group.shown = count), this.fill(group));
        group.body.append(moreButton(shown.length, rows.length, this.columns.length, more));
      }
    }

    /** Unfolds what holds a row, as far as needed. */
    reveal(row) {
      const group = this.groups.find((group) => group.rows.includes(row));
      if (!group.button) return;
      const index = sorted(group.rows.filter((other) => other.matches), this.order).indexOf(row);
      if (group.open && index < group.shown) return;
      group.shown = Math.max(group.shown, index + 20);
      this.unfold(group, true);
    }
  }

  const sections = [...document.querySelectorAll("section.model")];
  const links = [...document.querySelectorAll("nav [data-model]")];
  const details = (model) => sections[model].querySelector("details");

  /** Gives a model's tables and drawing their buttons, once it is looked at. */
  function wake(index) {
    const model = models[index];
    if (model.tables) return;
    const tables = [...sections[index].querySelectorAll("table[data-level]")];
    model.tables = tables.map((table) => new LevelTable(table, model.levels[table.dataset.level]));
    const growth = sections[index].querySelector("figure.growth");
    if (growth) makeReadable(growth, model.rows);
  }

  // The drawing: a slider and the pointer say what each layer is

  function makeReadable(figure, rows) {
    const svg = figure.querySelector("svg[data-growth]");
    const slider = figure.querySelector("input");
    const output = figure.querySelector("output");
    const cursor = figure.querySelector(".cursor");
    const byOrder = new Map();
    for (const row of rows) if (row.order !== null) byOrder.set(row.order, [...(byOrder.get(row.order) ?? []), row]);
    const orders = [...byOrder.keys()].sort((one, other) => one - other);
    const [left, right, first, last] = ["left", "right", "first", "last"].map((name) => Number(svg.dataset[name]));

    const show = () => {
      const order = orders[slider.value];
      const here = byOrder.get(order);
      const x = left + ((right - left) * (order - first)) / (last - first);
      cursor.setAttribute("transform", `translate(${x} 0)`);
      cursor.removeAttribute("hidden");
      const path = (row) => (row.mode && row.name.startsWith(`${row.mode}.`) ? row.name.slice(row.mode.length + 1) : row.name);
      const items = here.map((row) => {
        const text = `${row.mode} ${row.half} ${row.dtype} ${exponential(row.max_rel)}`.trim();
        const link = element("a", { className: "place", href: `#${rowAnchor(row)}`, textContent: text });
        return element("li", {}, link, " ", verdict(row.passed));
      });
      output.replaceChildren(element("b", { textContent: `${order}: ${path(here[0])}` }), element("ul", {}, ...items));
      const spoken = here.map((row) => `${row.mode} ${row.half} ${row.dtype} ${exponential(row.max_rel)}`);
      slider.setAttribute("aria-valuetext", `${order}: ${path(here[0])}; ${spoken.join("; ")}`);
    };
    slider.max = orders.length - 1;
    const failed = rows.filter((row) => row.order !== null && !row.passed).map((row) => row.order);
    slider.value = failed.length ? orders.indexOf(Math.min(...failed)) : 0;
    slider.addEventListener("input", show);
    svg.addEventListener("pointermove", (event) => {
      const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      const wanted = first + ((x - left) * (last - first)) / (right - left);
      const near = orders.reduce((one, other) => (Math.abs(other - wanted) < Math.abs(one - wanted) ? other : one));
      slider.value = orders.indexOf(near);
      show();
    });
    show();
  }

  // All rows, and the filter

  const form = byId("filter");
  const flat = { table: byId("all-rows"), order: { key: "used", descending: true }, shown: PAGE / 4 };
  flat.columns = [...flat.table.tHead.rows[0].cells].map((head) => head.dataset.sort);
  flat.showOrder = makeSortable(flat.table, flat.order, () => (showFlat(), remember()));

  function showFlat() {
    const rows = sorted(allRows.filter((row) => row.matches), flat.order);
    const shown = rows.slice(0, flat.shown);
    const body = flat.table.tBodies[0];
    body.replaceChildren(...shown.map((row) => tableRow(row, flat.columns)));
    if (!rows.length) {
      body.append(element("tr", {}, element("td", { colSpan: flat.columns.length, textContent: "No row matches." })));
    } else if (shown.length < rows.length) {
      const more = (count) => ((flat.shown = count), showFlat());
      body.append(moreButton(shown.length, rows.length, flat.columns.length, more));
    }
    const total = allRows.length.toLocaleString("en");
    byId("match-count").textContent =
      rows.length < allRows.length ? `${rows.length.toLocaleString("en")} of ${total} rows match` : `${total} rows`;
  }

  function filterRows() {
    const wanted = Object.fromEntries(FILTERS.map((name) => [name, form.elements[name].value]));
    const words = wanted.text.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of allRows) {
      row.matches = ["model", "level", "dtype", "half"].every((name) => !wanted[name] || row[name] === wanted[name]);
      if (wanted.verdict) row.matches &&= row.passed === (wanted.verdict === "passed");
      if (words.length && row.matches) {
        row.text ??= [row.model, row.level, row.name, row.dtype, row.half, row.reason, row.block].join(" ").toLowerCase();
        row.matches = words.every((word) => row.text.includes(word));
      }
    }
    flat.shown = PAGE / 4;
    showFlat();
    models.forEach((model, index) => {
      const none = model.rows.length > 0 && !model.rows.some((row) => row.matches);
      sections[index].hidden = none;
      links[index].classList.toggle("unmatched", none);
      for (const table of model.tables ?? []) {
        for (const group of table.groups) table.fill(group);
        table.table.closest("section.level").hidden = table.groups.every((group) => group.body.hidden);
      }
    });
  }

  /** Keeps filter and order in the address, so that it can be passed on. */
  function remember() {
    const state = new URLSearchParams();
    for (const name of FILTERS) if (form.elements[name].value) state.set(name, form.elements[name].value);
    const { key, descending } = flat.order;
    if (key !== "used" || !descending) state.set("sort", (descending ? "-" : "") + key);
    history.replaceState(null, "", `#${state.size ? `rows?${state}` : "report:rows"}`);
  }

  function recall(query) {
    const state = new URLSearchParams(query);
    for (const name of FILTERS) form.elements[name].value = state.get(name) ?? "";
    const sort = state.get("sort") ?? "-used";
    const key = sort.replace(/^-/, "");
    if (flat.columns.includes(key) || !key) Object.assign(flat.order, { key, descending: sort.startsWith("-") });
    flat.showOrder();
    filterRows();
  }

  for (const name of ["model", "level", "dtype", "half"]) {
    const values = [...new Set(allRows.map((row) => row[name]))].filter(Boolean);
    form.elements[name].append(...values.map((value) => element("option", { value, textContent: value })));
  }
  form.addEventListener("input", () => (filterRows(), remember()));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => (filterRows(), remember())));

  // The models' overview

  const overview = document.querySelector("table.overview");
  const overviewRows = [...overview.tBodies[0].rows];
  const overviewOrder = { key: "", descending: false };
  [...overview.tHead.rows[0].cells].forEach((head, index) => (head.dataset.sort = index || "name"));
  makeSortable(overview, overviewOrder, () => {
    const value = (row, key) => (key === "name" ? row.cells[0].dataset.value : Number(row.cells[key].dataset.value));
    overview.tBodies[0].append(...sorted(overviewRows, overviewOrder, value));
  });

  // Places: #report:rows, #model, #model/level, #model/level/name, #model/level/name/dtype/half

  function decoded(text) {
    try {
      return decodeURIComponent(text);
    } catch {
      return text;
    }
  }

  function rowsAt([model, level, name, dtype, half]) {
    const found = models.find((other) => other.name === model);
    const wanted = { level, name, dtype, half };
    const named = Object.keys(wanted).filter((key) => wanted[key] !== undefined);
    return (found?.rows ?? []).filter((row) => name !== undefined && named.every((key) => row[key] === wanted[key]));
  }

  function go() {
    const place = location.hash.slice(1);
    if (place.startsWith("rows?")) {
      recall(place.slice("rows?".length));
      byId("report:rows").scrollIntoView();
      return;
    }
    for (const old of document.querySelectorAll(".target")) old.classList.remove("target");
    const parts = place.split("/").map(decoded);
    const index = models.findIndex((model) => model.name === parts[0]);
    const rows = rowsAt(parts);
    if (index >= 0) {
      if (sections[index].hidden || rows.some((row) => !row.matches)) form.reset(), recall("");
      details(index).open = true;
      wake(index);
      for (const row of rows) for (const table of models[index].tables) if (owns(table, row)) table.reveal(row);
    }
    const targets = rows.length ? rows.map((row) => byId(rowAnchor(row))) : [byId(place)].filter(Boolean);
    if (rows.length) for (const target of targets) target.classList.add("target");
    if (!targets.length) return;
    targets[0].scrollIntoView({ block: rows.length ? "center" : "start" });
    targets[0].tabIndex = -1;
    targets[0].focus({ preventScroll: true });
  }

  const owns = (table, row) => table.groups.some((group) => group.rows.includes(row));

  // Start

  for (const waiting of document.querySelectorAll(".scripted")) waiting.hidden = false;
  if (matchMedia("(max-width: 999px)").matches) {
    for (const folding of document.querySelectorAll("nav > details, #filter > details")) folding.open = false;
  }
  sections.forEach((section, index) => {
    details(index).addEventListener("toggle", () => details(index).open && wake(index));
  });
  showFlat();
  sections.forEach((section, index) => details(index).open && wake(index));
  addEventListener("hashchange", go);
  if (location.hash) go();

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const folding of opened) folding.open = true;
  });
  addEventListener("afterprint", () => {
    for (const folding of opened) folding.open = false;
  });
})();
