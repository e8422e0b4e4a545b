// Filter the catalogue's table by words and by the values of three columns. Without this script the table is complete.
(() => {
  const table = document.querySelector("table.p2k-catalogue");
  const rows = [...table.tBodies[0].rows];
  const headings = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const form = document.createElement("form");
  form.className = "p2k-filter";
  form.setAttribute("role", "search");
  form.setAttribute("aria-label", "Filter the catalogue");
  form.addEventListener("submit", (event) => event.preventDefault());

  const labelled = (text, control) => {
    const label = document.createElement("label");
    label.append(text, control);
    control.addEventListener("input", apply);
    form.append(label);
    return control;
  };
  const words = labelled("Words", Object.assign(document.createElement("input"), { type: "search", name: "words" }));
  const selects = ["Part", "Kind", "Status"].map((name) => {
    const column = headings.indexOf(name);
    const values = [...new Set(rows.map((row) => row.cells[column].textContent.trim()))];
    const select = Object.assign(document.createElement("select"), { name: name.toLowerCase() });
    select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    return { column, select: labelled(name, select) };
  });
  const count = document.createElement("output");
  form.append(count);

  function apply() {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const kept = wanted.every((word) => text.includes(word))
        && selects.every(({ column, select }) => !select.value || row.cells[column].textContent.trim() === select.value);
      row.hidden = !kept;
      shown += kept;
    }
    count.textContent = `${shown} of ${rows.length} papers`;
  }
  table.parentElement.before(form);
  apply();
})();
